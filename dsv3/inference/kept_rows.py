"""Finished rows whose caches are kept for later prompts that begin alike, the least recently used given up first."""

from collections.abc import Sequence
from typing import Protocol

from dsv3.inference.backend import Backend
from dsv3.inference.prefixes import SHORTEST_SHARED
from dsv3.inference.sampling import Settings


class Finished(Protocol):
    """A row of the engine, which writes no more."""

    number: int
    owner: str
    tokens: list[int]
    prompt: int
    read: int
    settings: Settings


class KeptRows:
    """At most `positions` positions in all. Drafts that were not kept are forgotten."""

    def __init__(self, backend: Backend, positions: int) -> None:
        self.backend, self.limit = backend, positions
        self.rows: dict[int, Finished] = {}  # the least recently used first
        self.positions = 0

    def keep(self, row: Finished) -> None:
        """Take over a row of the backend, or drop it where it is too short to be shared or too long to be kept."""
        row.read = min(row.read, len(row.tokens))
        if not SHORTEST_SHARED <= row.read <= self.limit:
            self.backend.drop(row.number)
            return
        self.backend.rewind(row.number, row.read)
        for other in list(self.rows.values()):
            if other.owner == row.owner and is_prefix(other, row) and other.settings.drafts <= row.settings.drafts:
                self.drop(other.number)
        self.rows[row.number] = row
        self.positions += row.read
        while self.positions > self.limit:
            self.drop(next(iter(self.rows)))

    def used(self, row: int) -> None:
        """A prompt copied from this row, if it is one of these."""
        if row in self.rows:
            self.rows[row] = self.rows.pop(row)

    def drop(self, row: int) -> None:
        self.positions -= self.rows.pop(row).read
        self.backend.drop(row)

    def clear(self) -> None:
        for row in list(self.rows):
            self.drop(row)


def is_prefix(one: Finished, other: Finished) -> bool:
    """Whether all that `one` holds, `other` holds too."""
    held: Sequence[int] = one.tokens[: one.read]
    return held == other.tokens[: other.read][: len(held)]
