"""Rows cut into shorter ones while training is young (sequence-length warm-up).

Short rows in a step are of more documents, and cost less attention; what lies further back than a few hundred tokens is
of use only to a model that can read what is near. A pool of rows is dealt in turns: the first piece of every row, then
the second of every row, and so on. So the pieces of a step are of different documents, and every token is still a
target once. The length is that which the schedule gives where a pool begins.
"""

from typing import Any

import grain

from data.pipeline import Pack
from dsv3.contracts import Schedule

POOL_ROWS = 512
"""Rows dealt at a time: a document's pieces are so many pieces apart."""


class Pieces(grain.IterDataset):
    """Packs of `length` + 1 tokens as packs of l + 1 tokens that overlap by one.

    l is the largest divisor of `length` that is at most `piece_length(tokens)`, or 1; tokens are those of the rows
    before the pool. Where l is `length`, rows pass as they are.
    unit: rows of a micro-batch. Pools are of whole ones, so that the pieces of one have one length.
    """

    def __init__(self, parent: grain.IterDataset, *, length: int, piece_length: Schedule, unit: int) -> None:
        super().__init__(parent)
        self._settings = (length, piece_length, unit)

    def __iter__(self) -> grain.DatasetIterator:
        return _PiecesIterator(iter(self._parent), *self._settings)


class _PiecesIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, length: int, piece_length: Schedule, unit: int) -> None:
        super().__init__(parent)
        self._length, self._piece_length, self._unit = length, piece_length, unit
        self._before = 0  # rows in the pools before this one
        self._begin_pool()

    def _begin_pool(self) -> None:
        self._start = self._parent.get_state()
        self._piece = largest_divisor(self._length, self._piece_length(self._before * self._length))
        units = -(-POOL_ROWS // self._unit) if self._piece < self._length else 1
        self._size = units * self._unit
        self._dealt = 0
        self._rows: list[Pack] = []  # read when the first is dealt

    def __next__(self) -> Pack:
        if not self._rows:
            self._rows = [next(self._parent) for _ in range(self._size)]
        turn, row = divmod(self._dealt, self._size)
        tokens, domain = self._rows[row]
        pack = Pack(tokens[turn * self._piece : (turn + 1) * self._piece + 1], domain)
        self._dealt += 1
        if self._dealt == self._size * (self._length // self._piece):
            self._before += self._size
            self._begin_pool()
        return pack

    def get_state(self) -> dict[str, Any]:
        pool = {"start": self._start, "before": self._before, "piece": self._piece, "size": self._size}
        return pool | {"dealt": self._dealt}

    def set_state(self, state: dict[str, Any]) -> None:
        self._start, self._before, self._piece, self._size, self._dealt = (
            state[key] for key in ("start", "before", "piece", "size", "dealt")
        )
        self._rows = []
        self._parent.set_state(self._start)


def largest_divisor(length: int, limit: float) -> int:
    """The largest divisor of `length` that is at most `limit`; 1 where there is none."""
    return max((d for d in range(1, length + 1) if length % d == 0 and d <= limit), default=1)
