"""Texts to packed micro-batches: sources, tokenizer, fill-in-the-middle, Grain pipeline and datamodule."""
