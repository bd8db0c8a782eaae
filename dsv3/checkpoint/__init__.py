"""Run folders and checkpoints, and conversion to and from Hugging Face."""
