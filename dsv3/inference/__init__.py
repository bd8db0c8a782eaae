"""Text generation: decoding over caches, sampling, speculative decoding."""
