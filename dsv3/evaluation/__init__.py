"""Scores of a model: held-out text, questions, benchmarks."""
