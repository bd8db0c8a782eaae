"""Runs programs that a model wrote, where they can do no harm and cannot talk themselves into passing.

    guest.py      what runs in a jail: the worker has the model's code, the checker tests it; a service
    jail.py       the jail: a bubblewrap command line, limits
    seccomp.py    system calls that the jail refuses
    confined.py   a guest from its start to its end
    pool.py       many programs at once, each with a deadline
    service.py    a module of ours that works on what a model wrote, kept running

A program is never in one process with its tests. The worker, in a jail of its own, defines what the model wrote and
answers calls; the checker, in another, runs the test, in which the tested function stands for a call to the worker.
Only plain data (numbers, text, lists, ...) crosses between them, so neither an object that equals everything, nor a
changed builtin, nor a clean exit before the assertions reaches the test.
"""

from dsv3.sandbox.jail import Limits
from dsv3.sandbox.pool import Program, Sandbox, Verdict
from dsv3.sandbox.service import Service, ServiceError

__all__ = ["Limits", "Program", "Sandbox", "Service", "ServiceError", "Verdict"]
