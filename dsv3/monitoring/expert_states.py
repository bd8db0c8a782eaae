"""State of each expert in each interval, from its relative load (1: balanced), and since when it lasts.

dead      below 1% of the balanced load
starved   below a quarter of it
hot       above twice it
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from dsv3.monitoring.alerts import DEAD_BELOW

STARVED_BELOW = 0.25
HOT_ABOVE = 2.0
DEAD, STARVED, WELL, HOT = 0, 1, 2, 3
NAMES = ("dead", "starved", "well", "hot")
FEWEST = 20.0
"""Choices of the balanced load in an interval. With fewer, an expert may have none by chance."""


def relative(load: Any) -> np.ndarray:
    """Counts of experts (the last axis) over their mean, float32; 0 where all of them are 0."""
    load = np.asarray(load)
    mean = np.maximum(load.mean(-1, keepdims=True, dtype=np.float64), 1e-9)
    return np.divide(load, mean, dtype=np.float32, casting="same_kind")


def states(relative_load: np.ndarray) -> np.ndarray:
    """`DEAD`, `STARVED`, `WELL` or `HOT` for each relative load, int8 of the same shape; NaN is well."""
    state = np.full(relative_load.shape, WELL, dtype=np.int8)
    state[relative_load < STARVED_BELOW] = STARVED
    state[relative_load < DEAD_BELOW] = DEAD
    state[relative_load > HOT_ABOVE] = HOT
    return state


def whole(tokens_T: np.ndarray, start: int = 0) -> np.ndarray:
    """Which intervals are no shorter than half the median: those that a checkpoint or the end of training cut short
    hold too few tokens to judge experts by. bool [T], from the tokens at each interval's end."""
    length_T = np.diff(tokens_T, prepend=start)
    return length_T >= np.median(length_T) / 2 if len(length_T) else np.zeros(0, dtype=bool)


class Spell(NamedTuple):
    """Intervals in a row in which an expert was in one state other than well. `since` and `until` are tokens at its
    ends; `until` is None while it lasts."""

    expert: int
    state: int
    since: int
    until: int | None


def spells(state_TE: np.ndarray, tokens_T: np.ndarray, start: int = 0) -> Iterator[Spell]:
    """All spells, by expert. `tokens_T`: at the end of each interval; `start`: at the beginning of the first."""
    starts_T = np.concatenate([[start], tokens_T[:-1]])
    for expert in np.flatnonzero((state_TE != WELL).any(0)):
        state_T = state_TE[:, expert]
        changed = np.flatnonzero(np.diff(state_T)) + 1
        first, last = np.concatenate([[0], changed]), np.concatenate([changed, [len(state_T)]])
        for i, j in zip(first, last, strict=True):
            if state_T[i] != WELL:
                until = None if j == len(state_T) else int(starts_T[j])
                yield Spell(int(expert), int(state_T[i]), int(starts_T[i]), until)
