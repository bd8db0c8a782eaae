"""Layout: a row of training data as a function of its number.

The documents of a domain's epoch lie end to end in an order that follows from seed, domain and epoch. Rows of T + 1
tokens are slices of them that overlap by one, so that every token is a target once. What fills no row at the end of an
epoch opens the next one. Within an epoch rows are permuted, so that a step has rows of many documents.
"""

import bisect
import functools
import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from data.cache import number
from data.edition import DomainEdition
from data.shards import SMALL
from data.store import DomainTokens

Packing = Literal["cut", "whole"]

PERIOD = 10_000
"""Rows after which the table of domains repeats, at most."""

ROUNDS = 4
"""Of the block cipher behind Grain's index_shuffle; more shuffle no better for sizes like these."""


class Row(NamedTuple):
    """A row of T + 1 tokens."""

    tokens: np.ndarray  # int64
    domain: int


class Epoch(NamedTuple):
    """The documents of one epoch in their order. Token ids are addressed as if all arrays lay end to end."""

    arrays: list[np.ndarray]  # the store's shards, then the edition's files
    bases: list[int]  # address of each array's first id
    starts: np.ndarray  # int64 [documents], addresses
    ends: np.ndarray  # int64 [documents], tokens up to the end of each
    first_documents: np.ndarray | None  # where documents stay whole, of each row: its first; and one more

    @property
    def tokens(self) -> int:
        return int(self.ends[-1])

    def read(self, start: int, stop: int) -> list[np.ndarray]:
        """Tokens `start` to `stop` of the epoch, in pieces."""
        document = int(np.searchsorted(self.ends, start, side="right"))
        found = []
        while start < stop:
            end = int(self.ends[document])
            begin = int(self.ends[document - 1]) if document else 0
            address = int(self.starts[document]) + start - begin
            array = bisect.bisect_right(self.bases, address) - 1
            place = address - self.bases[array]
            found.append(self.arrays[array][place : place + min(stop, end) - start])
            start = min(stop, end)
            document += 1
        return found


def hashed(*parts: object) -> int:
    """A 32-bit seed. Sums would make seed 1, epoch 1 the same as seed 2, epoch 0."""
    return number("/".join(map(str, parts))) % 2**32


def document_order(count: int, *, seed: int, domain: str, epoch: int) -> np.ndarray:
    """A permutation of `count` documents: those with the smallest hashes first (splitmix64)."""
    key = np.uint64(number(f"{seed}/{domain}/{epoch}/documents"))
    with np.errstate(over="ignore"):
        mixed = (np.arange(count, dtype=np.uint64) + key) * np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.argsort(mixed ^ (mixed >> np.uint64(31)), kind="stable")


def write_layout(
    folder: Path,
    *,
    tokens: DomainTokens,
    edition: DomainEdition | None,
    seed: int,
    domain: str,
    epoch: int,
    packing: Packing,
    length: int,
) -> None:
    """Write addresses and ends of an epoch's documents into an empty folder.

    length: tokens of a row, T + 1; where documents stay whole, longer ones are left out.
    """
    starts, lengths = np.array(tokens.starts), np.array(tokens.lengths)
    if edition is not None:
        of_edition = np.cumsum(np.r_[0, edition.lengths])[:-1]
        starts[edition.documents] = of_edition + sum(len(shard) for shard in tokens.shards)
        lengths[edition.documents] = edition.lengths
    order = document_order(len(starts), seed=seed, domain=domain, epoch=epoch)
    if packing == "whole":
        order = order[lengths[order] <= length]
        if not len(order):
            raise ValueError(
                f"data.sources.{domain}: data.packing=whole, and no document fits in data.sequence_length + 1 = "
                f"{length} tokens"
            )
    ends = np.cumsum(lengths[order])
    if packing == "whole":
        np.save(folder / "first_documents.npy", first_documents(ends, length))
    for name, array in (("starts", starts[order]), ("ends", ends)):
        np.save(folder / f"{name}.npy", array.astype(np.int64))


def first_documents(ends: np.ndarray, length: int) -> np.ndarray:
    """The first document of each row that whole documents fill one after another, and the number of documents."""
    firsts = [0]
    while firsts[-1] < len(ends):
        before = ends[firsts[-1] - 1] if firsts[-1] else 0
        firsts.append(int(np.searchsorted(ends, before + length, side="right")))
    return np.array(firsts, np.int64)


def read_layout(folder: Path, *, tokens: DomainTokens, edition: DomainEdition | None) -> Epoch:
    arrays = [*tokens.shards, *(edition.files if edition is not None else [])]
    bases = np.cumsum([0, *map(len, arrays)])[:-1].tolist()
    starts, ends = (_mapped(folder / f"{name}.npy") for name in ("starts", "ends"))
    table = folder / "first_documents.npy"
    return Epoch(arrays, bases, starts, ends, _mapped(table) if table.exists() else None)


def _mapped(path: Path) -> np.ndarray:
    return np.asarray(np.load(path, mmap_mode="r" if path.stat().st_size > SMALL else None))


class DomainRows:
    """The rows of one domain by number, epoch after epoch without end."""

    def __init__(self, domain: str, *, seed: int, length: int, pad: int, epoch: Callable[[int], Epoch]) -> None:
        """`length`: T + 1. `epoch`: gives the layout of an epoch by its number, made if it is not there yet."""
        self.domain, self.seed, self.length, self.pad = domain, seed, length, pad
        self._epoch = epoch
        self._epochs: list[Epoch] = []
        self._token_ends = [0]  # tokens up to the end of each epoch, with a 0 before
        self._row_ends = [0]  # rows likewise
        self._lock = threading.Lock()  # rows may be asked for by several threads

    def __getitem__(self, index: int) -> np.ndarray:
        """Row `index`: int64 [T + 1]."""
        epoch = self.epoch_of(index)
        place = self._place(epoch, index)
        if self._epochs[epoch].first_documents is not None:
            return self._whole(self._epochs[epoch], place)
        start = (self._row_ends[epoch] + place) * (self.length - 1)
        return np.concatenate(self._read(start, start + self.length)).astype(np.int64)

    def epoch_of(self, index: int) -> int:
        """The epoch that row `index` belongs to."""
        with self._lock:
            while self._row_ends[-1] <= index:
                self._add_epoch()
        return bisect.bisect_right(self._row_ends, index) - 1

    def tokens(self, index: int) -> int:
        """How many of the first T tokens of row `index` are no padding; reads no token."""
        epoch = self.epoch_of(index)
        firsts = self._epochs[epoch].first_documents
        if firsts is None:
            return self.length - 1
        place = self._place(epoch, index)
        first, last = (int(document) for document in firsts[place : place + 2])
        ends = self._epochs[epoch].ends
        return min(self.length - 1, int(ends[last - 1]) - (int(ends[first - 1]) if first else 0))

    def _place(self, epoch: int, index: int) -> int:
        """Where the permutation of an epoch's rows puts row `index`."""
        first, last = self._row_ends[epoch : epoch + 2]
        return _index_shuffle()(index - first, last - first - 1, hashed(self.seed, self.domain, epoch, "rows"), ROUNDS)

    def _add_epoch(self) -> None:
        epoch = self._epoch(len(self._epochs))
        self._epochs.append(epoch)
        self._token_ends.append(self._token_ends[-1] + epoch.tokens)
        if epoch.first_documents is not None:
            self._row_ends.append(self._row_ends[-1] + len(epoch.first_documents) - 1)
        else:
            self._row_ends.append((self._token_ends[-1] - 1) // (self.length - 1))

    def _read(self, start: int, stop: int) -> list[np.ndarray]:
        epoch = bisect.bisect_right(self._token_ends, start) - 1
        pieces: list[np.ndarray] = []
        while start < stop:
            before, end = self._token_ends[epoch : epoch + 2]
            pieces += self._epochs[epoch].read(start - before, min(stop, end) - before)
            start, epoch = min(stop, end), epoch + 1
        return pieces

    def _whole(self, epoch: Epoch, place: int) -> np.ndarray:
        assert epoch.first_documents is not None
        first, last = (int(document) for document in epoch.first_documents[place : place + 2])
        start = int(epoch.ends[first - 1]) if first else 0
        row = np.full(self.length, self.pad, np.int64)
        tokens = np.concatenate(epoch.read(start, int(epoch.ends[last - 1])))
        row[: len(tokens)] = tokens
        return row


@functools.cache
def _index_shuffle() -> Callable[[int, int, int, int], int]:
    """Grain's, which its public API offers only within a dataset."""
    logging.getLogger("absl").setLevel(logging.ERROR)  # Grain's import warns that there is no jax profiler
    from grain.experimental import index_shuffle

    return index_shuffle


class Rows:
    """The rows of a run by number: a mixture of domains."""

    def __init__(self, domains: Sequence[DomainRows], table: np.ndarray) -> None:
        """`table`: the domain of each row, repeating (`mixture`)."""
        self._domains = domains
        self._table = table.tolist()
        ones = np.eye(len(domains), dtype=np.int64)[table]
        self._per_period = ones.sum(axis=0).tolist()
        before = np.cumsum(ones, axis=0) - ones
        self._before = before[np.arange(len(table)), table].tolist()  # rows of the same domain before, in the table

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: int) -> Row:
        domain, of_domain = self._in_domain(index)
        return Row(self._domains[domain][of_domain], domain)

    def tokens(self, index: int) -> int:
        """How many of the first T tokens of row `index` are no padding; reads no token."""
        domain, of_domain = self._in_domain(index)
        return self._domains[domain].tokens(of_domain)

    def _in_domain(self, index: int) -> tuple[int, int]:
        """The domain of row `index`, and its number among the domain's rows."""
        periods, place = divmod(index, len(self._table))
        domain = self._table[place]
        return domain, periods * self._per_period[domain] + self._before[place]

    def given(self, count: int) -> list[int]:
        """How many of the first `count` rows are of each domain."""
        periods, rest = divmod(count, len(self._table))
        of_rest = (
            np.bincount(self._table[:rest], minlength=len(self._domains)).tolist() if rest else [0] * len(self._domains)
        )
        return [periods * each + more for each, more in zip(self._per_period, of_rest)]


def mixture(weights: Mapping[str, float]) -> np.ndarray:
    """The domain (index) of each row, a table that repeats: after any number of its rows every domain is less than a
    row away from its share, and after the whole table none is away from it, if `PERIOD` rows or fewer allow that.

    Of the domains that a row would bring no further than a row above their shares, the one comes that would be the
    first to fall as far below (Tijdeman 1980, the chairman assignment problem).

    Raises:
        ValueError: a weight is so small that its domain has no row of `PERIOD`.
    """
    shares = np.array(list(weights.values())) / sum(weights.values())
    for period in range(1, PERIOD + 1):
        counts = shares * period
        if np.abs(counts - counts.round()).max() < 1e-9 * period:
            break
    slack = 1 / max(1, 2 * len(shares) - 2)  # no domain is further away than 1 - slack
    given = np.zeros(len(shares))
    table = np.zeros(period, np.int64)
    for i in range(period):
        is_due = (i + 1) * shares - given > slack - 1e-9
        table[i] = np.argmin(np.where(is_due, (given + 1 - slack) / shares, np.inf))
        given[table[i]] += 1
    for name, count in zip(weights, given):
        if not count:
            raise ValueError(
                f"data.sources.{name}.weight={weights[name]}: must be at least 1/{PERIOD:,} of all weights"
            )
    return table
