"""Finished rows whose caches are kept for later prompts that begin alike, the least recently used given up first."""

from dataclasses import dataclass
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


@dataclass(frozen=True)
class KeptRow:
    """What is known of a finished row; what else it held, such as who listened to it, is let go."""

    number: int
    owner: str
    tokens: list[int]  # those whose positions the backend holds
    prompt: int
    settings: Settings

    @property
    def read(self) -> int:
        return len(self.tokens)


class KeptRows:
    """At most `positions` positions in all. Drafts that were not kept are forgotten."""

    def __init__(self, backend: Backend, positions: int) -> None:
        self.backend, self.limit = backend, positions
        self.rows: dict[int, KeptRow] = {}  # the least recently used first
        self.positions = 0

    def keep(self, row: Finished) -> None:
        """Take over a row of the backend, or drop it where it is too short to be shared or too long to be kept."""
        tokens = row.tokens[: row.read]
        kept = KeptRow(row.number, row.owner, tokens, min(row.prompt, len(tokens)), row.settings)
        if not SHORTEST_SHARED <= kept.read <= self.limit:
            self.backend.drop(kept.number)
            return
        self.backend.rest(kept.number, kept.read)
        for other in list(self.rows.values()):
            is_prefix = tokens[: other.read] == other.tokens
            if other.owner == kept.owner and is_prefix and other.settings.may_draft <= kept.settings.may_draft:
                self.drop(other.number)
        self.rows[kept.number] = kept
        self.positions += kept.read
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
