"""dsv3: train, ablate, evaluate and watch DeepSeek-V3-style models."""

__version__ = "0.1.0"
