"""What is looked up by the latest tokens and added to their embeddings; one module each."""
