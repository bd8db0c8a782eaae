"""Lookup memories: tables addressed by the latest tokens, added to the embeddings."""
