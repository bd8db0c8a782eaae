"""Caches of many rows in one array, which an ONNX graph reads and writes in place.

Row b of a batch lies in the b-th slot from the batch's first one, so that rows that are read together lie side by side:
the rows held fill the slots from 0 on, and trade places where a batch needs it. All slots are as wide as the longest
row needs, in whole blocks.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsv3.model.layers import CACHE_BLOCK

Array = NDArray[Any]


class SlotCaches:
    """widths: of each cache, numbers a position."""

    def __init__(self, widths: Mapping[str, int]) -> None:
        self.held: dict[str, Array] = {name: np.zeros((1, CACHE_BLOCK, n), np.float32) for name, n in widths.items()}
        self.order: list[int] = []  # the row in each slot
        self.lengths: dict[int, int] = {}

    @property
    def room(self) -> int:
        """Positions of a slot."""
        return next(iter(self.held.values())).shape[1]

    @property
    def slots(self) -> int:
        return len(next(iter(self.held.values())))

    def add(self, row: int) -> None:
        if len(self.order) == self.slots:
            self._resize(2 * self.slots, self.room)
        self.order.append(row)
        self.lengths[row] = 0

    def copy(self, source: int, row: int, length: int) -> None:
        if row not in self.lengths:
            self.add(row)
        at, to = self.order.index(source), self.order.index(row)
        for array in self.held.values():
            array[to, :length] = array[at, :length]
        self.lengths[row] = length

    def drop(self, row: int) -> None:
        """The last row takes its slot."""
        self._swap(self.order.index(row), len(self.order) - 1)
        self.order.pop()
        del self.lengths[row]
        if self.slots > 4 * max(len(self.order), 1):
            self._resize(self.slots // 2, self.room)

    def rewind(self, row: int, length: int) -> None:
        self.lengths[row] = length

    def together(self, rows: Sequence[int], count: int) -> int:
        """Let these rows lie side by side, in any order, with room for `count` further positions; their first slot."""
        slots = sorted(self.order.index(row) for row in rows)
        first = slots[0]
        if slots[-1] - first >= len(slots):
            first = 0
            for to, at in enumerate(slots):
                self._swap(to, at)  # slots are in order: none that was moved is moved again
        needed = max(max(self.lengths[row] for row in rows) + count, *self.lengths.values())
        needed = -(-needed // CACHE_BLOCK) * CACHE_BLOCK
        if needed > self.room or 2 * needed <= self.room:
            self._resize(self.slots, needed)
        return first

    def _swap(self, a: int, b: int) -> None:
        if a == b:
            return
        one, other = self.order[a], self.order[b]
        for array in self.held.values():
            here = array[a, : self.lengths[one]].copy()
            array[a, : self.lengths[other]] = array[b, : self.lengths[other]]
            array[b, : len(here)] = here
        self.order[a], self.order[b] = other, one

    def _resize(self, slots: int, room: int) -> None:
        for name, old in self.held.items():
            new = np.zeros((slots, room, old.shape[2]), np.float32)
            for slot, row in enumerate(self.order):
                new[slot, : self.lengths[row]] = old[slot, : self.lengths[row]]
            self.held[name] = new
