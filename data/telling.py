"""Lines that tell where a text comes from, and training documents that repeat held-out ones."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash

TRIVIAL = 12
"""Lines of fewer characters (brackets, `return`, `else:`) tell nothing about where a text comes from."""

COMMON = 20
"""A line that more training documents than this have tells nothing either."""


def content_hash(parts: Iterable[str]) -> int:
    """64 bits of a text that arrives in parts."""
    state = xxhash.xxh3_64()
    for part in parts:
        state.update(part.encode())
    return state.intdigest()


def lines_of(text: str) -> set[str]:
    """The distinct lines of a text, without surrounding space, that are long enough to tell something."""
    return {stripped for line in text.splitlines() if len(stripped := line.strip()) >= TRIVIAL}


def line_hashes(text: str) -> np.ndarray:
    """Of `lines_of` the text: uint64, sorted."""
    digest = xxhash.xxh3_64_intdigest
    return np.sort(np.array([digest(line.encode()) for line in lines_of(text)], np.uint64))


def write_lines(folder: Path, texts: Sequence[str]) -> None:
    """The lines of all held-out documents, for `Telling`."""
    of_each = [line_hashes(text) for text in texts]
    lines, places = np.unique(np.concatenate([*of_each, np.zeros(0, np.uint64)]), return_inverse=True)
    owners = np.repeat(np.arange(len(texts)), [len(hashes) for hashes in of_each])
    order = np.argsort(places, kind="stable")
    np.save(folder / "lines.npy", lines)
    np.save(folder / "line_starts.npy", np.searchsorted(places[order], np.arange(len(lines) + 1)))
    np.save(folder / "line_owners.npy", owners[order].astype(np.int32))
    hashes = [content_hash([text]) for text in texts]
    np.save(folder / "contents.npy", np.unique(np.array(hashes, np.uint64)))


class Telling:
    """The lines of the held-out documents, memory-mapped, and which training documents repeat too many of them."""

    def __init__(self, folder: Path) -> None:
        self.lines = np.load(folder / "lines.npy", mmap_mode="r")
        self.contents = np.load(folder / "contents.npy", mmap_mode="r")
        self._folder = folder

    def found(self, text: str) -> np.ndarray:
        """Indices of the held-out lines that a text has: int32, ascending."""
        hashes = line_hashes(text)
        places = np.searchsorted(self.lines, hashes)
        inside = places < len(self.lines)
        return places[inside][self.lines[places[inside]] == hashes[inside]].astype(np.int32)

    def is_held_out(self, content: int) -> bool:
        place = int(np.searchsorted(self.contents, np.uint64(content)))
        return place < len(self.contents) and int(self.contents[place]) == content

    def near_duplicates(self, documents: np.ndarray, lines: np.ndarray) -> np.ndarray:
        """The training documents that have at least half of some held-out document's telling lines.

        documents, lines: int64 and int32 of one length, a pair for each held-out line that a training document has.
        """
        starts = np.load(self._folder / "line_starts.npy", mmap_mode="r")
        owners = np.load(self._folder / "line_owners.npy")
        telling = np.bincount(lines, minlength=len(self.lines)) <= COMMON
        of_line = np.diff(starts)
        needed = np.bincount(
            owners[np.repeat(telling, of_line)], minlength=1
        )  # telling lines of each held-out document
        pairs = telling[lines]
        documents, lines = documents[pairs], lines[pairs]
        order = np.argsort(documents, kind="stable")
        documents, lines = documents[order], lines[order]
        dropped = []
        for document, start, end in _runs(documents):
            of_document = lines[start:end]
            shared = np.concatenate([owners[starts[line] : starts[line + 1]] for line in of_document])
            held_out, counts = np.unique(shared, return_counts=True)
            if (2 * counts >= needed[held_out]).any():
                dropped.append(document)
        return np.array(dropped, np.int64)


def _runs(values: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(value, start, end) of each run of equal values."""
    edges = np.flatnonzero(np.diff(values)) + 1
    starts, ends = np.r_[0, edges], np.r_[edges, len(values)]
    for start, end in zip(starts.tolist(), ends.tolist()):
        if end > start:
            yield int(values[start]), start, end
