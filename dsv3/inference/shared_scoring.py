"""Logits of rows of tokens over a backend; what rows begin with is read once.

A batch is read in three passes. All of its beginnings may themselves begin alike, as few-shot prompts do: that part is
read first, and stays held for the batches that follow. Then the rest of each beginning, for all of them together; then
the rest of each row.

Shape legend: V vocabulary.
"""

import itertools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dsv3.inference.backend import Backend
from dsv3.inference.engine import PREFILL
from dsv3.inference.prefixes import common_prefix

Ids = Sequence[int]


class SharedScoring:
    """Until it is closed, the weights must not change, and no rows but its own be held by the backend."""

    def __init__(self, backend: Backend) -> None:
        self.backend = backend
        self.first: list[int] = []  # ids that row 0 holds; it is there where there are any

    def close(self) -> None:
        """Hold nothing, until logits are wanted again."""
        if self.first:
            self.backend.drop(0)
            self.first = []

    def logits(self, rows: Sequence[Ids], keep: Sequence[int], shared: Sequence[int]) -> list[Tensor]:
        """Of each row the float32 logits [keep, V] at its last positions. shared: how many leading ids of each are read
        once for all rows that begin with them; no logits are wanted there."""
        numbers = itertools.count(1)
        beginnings = {tuple(row[:count]): 0 for row, count in zip(rows, shared, strict=True)}
        self._hold_first(list(beginnings))
        for ids in beginnings:
            if len(ids) > len(self.first):
                beginnings[ids] = self._copied(0, next(numbers), len(self.first))
        self._read({row: ids[len(self.first) :] for ids, row in beginnings.items() if row}, {})
        sources = [beginnings[tuple(row[:count])] for row, count in zip(rows, shared, strict=True)]
        scored = [self._copied(source, next(numbers), count) for source, count in zip(sources, shared, strict=True)]
        rests = {number: row[count:] for number, row, count in zip(scored, rows, shared, strict=True)}
        found = self._read(rests, dict(zip(scored, keep, strict=True)))
        for row in (*filter(None, beginnings.values()), *scored):
            self.backend.drop(row)
        return [found[row] for row in scored]

    def _hold_first(self, beginnings: Sequence[Ids]) -> None:
        """Let row 0 hold what they all begin with."""
        first = list(beginnings[0][: common_prefix(beginnings)])
        held = common_prefix([self.first, first])
        if not held:
            self.close()
            if first:
                self.backend.add(0, drafts=False)
        else:
            self.backend.rewind(0, held)
        self.first = first
        self._read({0: first[held:]}, {})

    def _copied(self, source: int, row: int, length: int) -> int:
        self.backend.add(row, drafts=False)
        if length:
            self.backend.copy(source, row, length)
        return row

    def _read(self, rows: Mapping[int, Ids], keep: Mapping[int, int]) -> dict[int, Tensor]:
        """Append ids to each row, `PREFILL` at once, and return the logits at the last `keep` of them."""
        found: dict[int, list[Tensor]] = {row: [] for row in keep}
        for start in range(0, max(map(len, rows.values()), default=0), PREFILL):
            pieces = {row: ids[start : start + PREFILL] for row, ids in rows.items() if len(ids) > start}
            wanted = {}
            for row, piece in pieces.items():
                end = start + len(piece)
                wanted[row] = max(0, end - max(start, len(rows[row]) - keep.get(row, 0)))
            logits = self.backend.read(list(pieces), list(pieces.values()), list(wanted.values()))
            for row, logits_KV in zip(pieces, logits, strict=True):
                if wanted[row]:
                    found[row].append(logits_KV)
        return {row: torch.cat(parts) for row, parts in found.items()}
