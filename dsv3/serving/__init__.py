"""OpenAI-compatible API, web chat and accounts."""
