"""Benchmarks: lm-eval (arXiv 2405.14782) as the engine, this project's models behind it.

    models.py       what the engine asks of a model: logits of token rows, decoding over caches
    adapter.py      the same as an lm-eval model: loglikelihood, rolling loglikelihood, generate-until
    prefixes.py     token rows that begin alike are scored together, their beginning once
    decoding.py     several prompts continued at once
    tasks.py        finding tasks by name, ours and lm-eval's, and saying why one cannot be had
    shots.py        as many few-shot examples as the model's context holds
    answers.py      bits per byte of the right answer, for every task
    suite.py        which tasks, with how many shots and samples; running one
    results.py      results in lm-eval's format, all generations, the table
    compare.py      two models on the same documents
    sandbox/        runs generated programs
    code.py         what lm-eval's tasks reach the sandbox by

`import lm_eval` takes a second and its index of tasks ten, so nothing outside this package imports it, and the
modules of this package are imported only when benchmarks run.
"""
