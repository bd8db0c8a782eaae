"""Sandbox pool: runs programs in parallel, each with a deadline."""

import contextlib
import functools
import itertools
import json
import os
import select
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from dsv3.sandbox.confined import Confined
from dsv3.sandbox.guest import needs_helpers
from dsv3.sandbox.jail import Limits, missing

LONGEST_VERDICT = 10_000  # bytes
WATCH_EVERY = 0.05
"""Seconds between looks at the memory of a program: page tables are in no limit of a process."""


class Program(NamedTuple):
    """What a model wrote, and what it is tested with. All fields are Python source but the last."""

    code: str  # the model's, with what its prompt began
    test: str  # trusted: runs in the checker; with an entry point it defines `check(candidate)`
    setup: str = ""  # trusted: runs before the test, in the same namespace
    entry_point: str = ""  # the function under test; "": `code` defines what the test's free names mean


class Verdict(NamedTuple):
    passed: bool
    detail: str  # why not
    seconds: float


class Sandbox:
    """Runs programs in jails, or, where `unsafe` is chosen and there is no jail, under their limits alone."""

    def __init__(self, limits: Limits | None = None, *, unsafe: bool = False, workers: int | None = None) -> None:
        self.limits = limits or Limits()
        self.workers = workers or len(os.sched_getaffinity(0))
        self.refusal = refusal()
        self.jailed = self.refusal is None
        self.unsafe = unsafe
        self.usable = self.jailed or unsafe

    def run(self, programs: Sequence[Program]) -> list[Verdict]:
        """Verdicts in the order of the programs.

        Raises:
            RuntimeError: there is no jail, and none was waived.
        """
        if not self.usable:
            raise RuntimeError(f"{self.refusal}; confirm_run_unsafe_code=true runs programs without it")
        # Before the threads: CPython 3.11 up to 3.11.7 raises SystemError where two threads parse Python at once
        # (python/cpython#106905).
        helpers = [needs_helpers(program._asdict()) for program in programs]
        judged = functools.partial(judge, limits=self.limits, jailed=self.jailed)
        with ThreadPoolExecutor(self.workers) as pool:
            return list(pool.map(judged, programs, helpers))


@functools.cache
def refusal() -> str | None:
    """Why there can be no jail on this machine, found by running a program in one; None if there can."""
    if reason := missing():
        return reason
    proof = Program(code="def f(x):\n    return x + 1", test="def check(f):\n    assert f(1) == 2", entry_point="f")
    verdict = judge(proof, helpers=False, limits=Limits(), jailed=True)
    return None if verdict.passed else f"bubblewrap cannot make a sandbox here ({verdict.detail})"


def judge(program: Program, helpers: bool, *, limits: Limits, jailed: bool) -> Verdict:
    """Run one program against its test, with helpers of its prompt or without; whatever goes wrong is its failure."""
    started = time.monotonic()
    fields = program._asdict()
    workers = ["worker", "helper"] if helpers else ["worker"]
    guests: list[Confined] = []
    with contextlib.ExitStack() as stack:

        def start(role: str, settings: dict[str, Any], **files: Any) -> None:
            guests.append(Confined(role, settings, limits, jailed=jailed, **files))
            stack.callback(guests[-1].end)

        verdict = stack.enter_context(_pipe())
        links = [(stack.enter_context(_pipe()), stack.enter_context(_pipe())) for _ in workers]
        job = stack.enter_context(tempfile.TemporaryFile())
        job.write(json.dumps(fields).encode())
        job.seek(0)
        for role, (to_worker, to_checker) in zip(workers, links, strict=True):
            start(role, {}, stdin=to_worker.read, stdout=to_checker.write)
        ends = [(to_checker.read, to_worker.write) for to_worker, to_checker in links]
        settings = {"job_fd": job.fileno(), "verdict_fd": verdict.write, "workers": ends}
        start("checker", settings, pass_fds=[job.fileno(), verdict.write, *itertools.chain(*ends)])
        for end in itertools.chain(*links):
            end.close()
        verdict.close_write()
        detail = _verdict(verdict.read, guests, started + limits.deadline, limits.memory)
    return Verdict(not detail, detail, time.monotonic() - started)


def _verdict(fd: int, guests: Sequence[Confined], deadline: float, memory: int) -> str:
    """What the checker says: "" for a pass. Its silence, up to the deadline, is a failure."""
    content = b""
    while len(content) < LONGEST_VERDICT:
        left = deadline - time.monotonic()
        ready, _, _ = select.select([fd], [], [], min(max(0.0, left), WATCH_EVERY))
        if not ready:
            if left <= 0:
                return "timed out"
            if sum(guest.memory() for guest in guests) > memory:
                return "more memory than there is"
            continue
        piece = os.read(fd, LONGEST_VERDICT)
        if not piece:
            break
        content += piece
    try:
        return str(json.loads(content)["failure"])
    except ValueError:
        return "the checker gave no verdict"


class _Pipe:
    def __init__(self) -> None:
        self.read, self.write = os.pipe()
        self._open = {self.read, self.write}

    def close_write(self) -> None:
        if self.write in self._open:
            self._open.remove(self.write)
            os.close(self.write)

    def close(self) -> None:
        self.close_write()
        if self.read in self._open:
            self._open.remove(self.read)
            os.close(self.read)


@contextlib.contextmanager
def _pipe() -> Iterator[_Pipe]:
    pipe = _Pipe()
    try:
        yield pipe
    finally:
        pipe.close()
