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
        self.resting: dict[int, dict[str, Array]] = {}  # rows that are only copied from: they need no slot

    @property
    def room(self) -> int:
        """Positions of a slot."""
        return next(iter(self.held.values())).shape[1]

    @property
    def slots(self) -> int:
        return len(next(iter(self.held.values())))

    @property
    def position_bytes(self) -> int:
        return sum(array.itemsize * array.shape[2] for array in self.held.values())

    def add(self, row: int) -> None:
        if len(self.order) == self.slots:
            self._resize(2 * self.slots, self.room)
        self.order.append(row)
        self.lengths[row] = 0

    def copy(self, source: int, row: int, length: int) -> None:
        if row not in self.lengths:
            self.add(row)
        if length > self.room:
            self._resize(self.slots, blocks(length))
        to = self.order.index(row)
        for name, array in self.held.items():
            array[to, :length] = self._numbers(source, name)[:length]
        self.lengths[row] = length

    def rest(self, row: int) -> None:
        """Take a row out of its slot."""
        numbers = {name: self._numbers(row, name)[: self.lengths[row]].copy() for name in self.held}
        length = self.lengths[row]
        self.drop(row)
        self.resting[row], self.lengths[row] = numbers, length

    def _numbers(self, row: int, name: str) -> Array:
        resting = self.resting.get(row)
        return self.held[name][self.order.index(row)] if resting is None else resting[name]

    def drop(self, row: int) -> None:
        """The last row takes its slot."""
        if row in self.resting:
            del self.resting[row], self.lengths[row]
            return
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
        longest = max(self.lengths[row] for row in self.order)
        needed = blocks(max(longest, max(self.lengths[row] for row in rows) + count))
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


def blocks(length: int) -> int:
    """Positions of the whole blocks that hold so many."""
    return -(-length // CACHE_BLOCK) * CACHE_BLOCK
