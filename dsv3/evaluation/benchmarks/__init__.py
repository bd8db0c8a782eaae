"""Benchmarks: lm-eval (arXiv 2405.14782) as the engine, this project's models behind it.

`import lm_eval` takes a second and its index of tasks ten, so that modules of this package are imported only when
benchmarks run.
"""
