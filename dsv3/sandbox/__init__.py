"""Runs programs that a model wrote, where they can do no harm and cannot talk themselves into passing.

    guest.py      the two programs that run in a jail: the worker runs the model's code, the checker tests it
    jail.py       the jail: a bubblewrap command line, limits, a seccomp filter
    pool.py       many programs at once, each with a deadline

A program is never in one process with its tests. The worker, in a jail of its own, defines what the model wrote and
answers calls; the checker, in another, runs the test, in which the tested function stands for a call to the worker.
Only plain data (numbers, text, lists, ...) crosses between them, so neither an object that equals everything, nor a
changed builtin, nor a clean exit before the assertions reaches the test.
"""

from dsv3.sandbox.pool import Program, Sandbox, Verdict

__all__ = ["Program", "Sandbox", "Verdict"]
