"""Shards: token ids of a domain's documents in files, each whole or absent.

A shard ends with a document. It is written beside its place and renamed; a file of facts about its documents follows,
and only with it the shard counts.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.telling import COMMON

SHARD = 32_000_000
"""Tokens from which on a shard is closed."""

SMALL = 1 << 16
"""Bytes up to which a file is read: a process can map only so many."""


class Text(NamedTuple):
    """A document, or a piece of one."""

    text: str
    begins: bool  # whether a document begins with it
    ends: bool
    is_copy: bool  # where a document ends: whether its text is held out
    name: str
    number: int  # of the document, among all that have text


class Encoded(NamedTuple):
    ids: np.ndarray  # of all texts, BOS and EOS among them
    lengths: list[int]
    line_texts: np.ndarray  # int64, for each held-out line that is found: the text
    lines: np.ndarray  # int32, and the line
    changed: int  # the first text that its ids do not give back; -1: all do


def shard_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.ids"


def mapped(path: Path, dtype: str) -> np.ndarray:
    """A file of token ids, memory-mapped unless it is small. (A plain array: slices of np.memmap are slow.)"""
    if path.stat().st_size <= SMALL:
        return np.fromfile(path, dtype)
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def write_beside(path: Path, write: Callable[[Any], None]) -> None:
    """Write a binary file whole or not at all."""
    beside = path.with_name(f".{path.name}.part")
    with beside.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


class Shards:
    """The shards of one domain, those there are and those to come."""

    def __init__(self, folder: Path, dtype: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.dtype = folder, dtype
        self.count = 0
        while _facts_path(folder, self.count).exists():
            self.count += 1
        self.consumed = int(read_facts(folder, self.count - 1)["consumed"]) if self.count else 0

    def write(self, encoded: Iterable[tuple[list[Text], Encoded]]) -> Iterator[int]:
        """Write documents that are tokenised; yields the characters of each batch once it is written."""
        shard = None
        for batch, of_batch in encoded:
            shard = shard or Shard(shard_path(self.folder, self.count), self.dtype)
            shard.add(batch, of_batch)
            if batch[-1].ends and shard.tokens >= SHARD:
                self._close(shard)
                shard = None
            yield sum(len(each.text) for each in batch)
        if shard is not None:
            self._close(shard)

    def _close(self, shard: "Shard") -> None:
        shard.close(_facts_path(self.folder, self.count))
        self.count += 1


class Shard:
    """One shard while it is written."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.path, self.dtype = path, dtype
        self.tokens = 0
        self._beside = path.with_name(f".{path.name}.part")
        self._file = self._beside.open("wb")
        self._lengths: list[int] = []
        self._copies: list[int] = []
        self._documents: list[np.ndarray] = []
        self._lines: list[np.ndarray] = []
        self._open = 0  # tokens of the document that has begun
        self._consumed = 0
        self._changed = ""

    def add(self, batch: list[Text], encoded: Encoded) -> None:
        self._file.write(encoded.ids.tobytes())
        self.tokens += len(encoded.ids)
        places = np.zeros(len(batch), np.int64)  # the document of each text
        for i, (each, length) in enumerate(zip(batch, encoded.lengths, strict=True)):
            places[i] = len(self._lengths)
            self._open += length
            if each.ends:
                if each.is_copy:
                    self._copies.append(len(self._lengths))
                self._lengths.append(self._open)
                self._open = 0
                self._consumed = each.number + 1
        self._documents.append(places[encoded.line_texts])
        self._lines.append(encoded.lines)
        if encoded.changed >= 0:
            self._changed = self._changed or batch[encoded.changed].name

    def close(self, facts: Path) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._beside.replace(self.path)
        documents, lines = _few_of_each(np.concatenate(self._documents), np.concatenate(self._lines))
        arrays: dict[str, Any] = {
            "lengths": np.array(self._lengths, np.int64),
            "copies": np.array(self._copies, np.int64),
            "line_documents": documents,
            "lines": lines,
            "consumed": np.array(self._consumed),
            "changed": np.array(self._changed),
        }
        write_beside(facts, lambda file: np.savez(file, **arrays))


def _few_of_each(documents: np.ndarray, lines: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct pairs of a document and a line, of each line at most one more than make it common."""
    pairs = np.unique(np.stack([lines.astype(np.int64), documents]), axis=1)
    _, first = np.unique(pairs[0], return_index=True)
    ranks = np.arange(pairs.shape[1]) - np.repeat(first, np.diff(np.r_[first, pairs.shape[1]]))
    few = pairs[:, ranks <= COMMON]
    return few[1], few[0].astype(np.int32)


def _facts_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.npz"


def read_facts(folder: Path, number: int) -> dict[str, np.ndarray]:
    with np.load(_facts_path(folder, number)) as facts:
        return dict(facts)
