"""Callbacks of a training run, one concern per file; `conf/callbacks/` chooses them, `phases` orders them."""
