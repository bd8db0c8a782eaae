"""Text sampled from the model in training."""
