"""Documents with the smallest hashes, whatever order they come in: what is held out, and a sample of the rest."""

import heapq
from collections.abc import Iterator
from typing import NamedTuple

from data.documents import HeldOut

SAMPLE = 10_000_000
"""Characters of training text of each domain that are kept for training a tokenizer."""


class Sample:
    """The texts with the smallest hashes, up to `SAMPLE` characters."""

    def __init__(self) -> None:
        self._heap: list[tuple[int, str]] = []  # the largest hash first
        self._characters = 0

    def offer(self, number: int, text: str) -> None:
        text = text[:SAMPLE]
        if self._characters >= SAMPLE and (-number, text) <= self._heap[0]:
            return
        heapq.heappush(self._heap, (-number, text))
        self._characters += len(text)
        while self._characters - len(self._heap[0][1]) >= SAMPLE:
            self._characters -= len(heapq.heappop(self._heap)[1])

    def texts(self) -> Iterator[str]:
        left = SAMPLE
        for _, text in sorted(self._heap, reverse=True):
            yield text[:left]
            left -= len(text[:left])


class Kept(NamedTuple):
    """A document that may be held out."""

    order: int  # its hash, or its group's
    number: int
    size: int
    document: HeldOut


class Smallest:
    """Documents of the smallest hashes, whole groups, up to a number of bytes: the same in whatever order they come."""

    def __init__(self, limit: int) -> None:
        self._heap: list[tuple[int, int, Kept]] = []  # the largest hash first
        self._limit = limit
        self._bytes = 0
        self._below = 2**64  # the smallest hash that there was no room for

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def kept(self) -> list[Kept]:
        return [kept for _, _, kept in self._heap]

    def add(self, kept: Kept) -> list[Kept]:
        """Take a document; what goes instead, or itself."""
        if kept.order >= self._below:
            return [kept]
        heapq.heappush(self._heap, (-kept.order, kept.number, kept))
        self._bytes += kept.size
        return self.leave(self._limit)

    def leave(self, limit: int) -> list[Kept]:
        """Keep no more than `limit` bytes; what goes."""
        gone: list[Kept] = []
        while self._bytes > limit:
            self._below = -self._heap[0][0]
            while self._heap and -self._heap[0][0] == self._below:
                gone.append(heapq.heappop(self._heap)[2])
                self._bytes -= gone[-1].size
        return gone
