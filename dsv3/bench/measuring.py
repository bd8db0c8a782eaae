"""Interleaved repetitions and their ratios.

Two programs are compared in turns, a b a b ..., so that whatever else the machine does falls on both, and by medians,
so that single disturbances fall out. Nothing is said in absolute times alone: every figure stands beside what it is
compared with, measured in the same minutes.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Figure(NamedTuple):
    """One line of the table."""

    case: str
    what: str
    value: float  # what `unit` says
    unit: str
    goal: float | None = None  # what it should reach
    at_most: bool = False  # the goal is an upper bound
    note: str = ""  # the times that it was made of

    @property
    def reached(self) -> bool | None:
        if self.goal is None:
            return None
        return self.value <= self.goal if self.at_most else self.value >= self.goal


def interleaved(
    programs: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Median seconds of each program, called in turns; with `clock=time.process_time`, of the CPU."""
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(warm_up + repeats):
        for name, program in programs.items():
            started = clock()
            program()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn >= warm_up:
                seconds[name].append(clock() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it torch has one thread, whatever the process had."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def fastest(programs: Mapping[str, Callable[[], object]]) -> str:
    """The name of the fastest program, by the medians of three turns after one that warms up."""
    seconds = interleaved(programs, repeats=3)
    return min(seconds, key=lambda name: seconds[name])
