"""Edition: the token ids of those documents that one epoch renders otherwise than the store has them.

Some are rearranged for fill-in-the-middle (`data.fim`), in some tokens that join punctuation and line breaks are split.
Which ones, and where they are cut, follows from the epoch and the document alone, so that the seeds of a study share an
edition.
"""

import codecs
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from data.cache import number
from data.documents import PIECE
from data.fim import FillInTheMiddle, rearrange
from data.processes import Processes
from data.shards import mapped, shard_path, write_beside
from data.store import DomainTokens, Store, id_type

if TYPE_CHECKING:
    from dsv3.contracts import Tokenizer

TASK = 2_000_000
"""Tokens of documents that are rendered into one file."""

BLOCK = 1 << 18
"""Tokens of a document that are decoded at a time."""

CHOICE, CUTS, SPLITS = 0, 1, 2
"""Purposes of random numbers."""


class DomainEdition(NamedTuple):
    """The rendered documents of a domain in one epoch. Ids are addressed as if the files lay end to end."""

    files: list[np.ndarray]  # memory-mapped
    documents: np.ndarray  # int64, ascending: indices into the store's
    lengths: np.ndarray  # int64, in tokens


class Rendering(NamedTuple):
    """How documents are rendered; sent to the processes."""

    tokenizer: "Tokenizer"
    fim: FillInTheMiddle
    split_share: float
    halves: dict[int, list[int]]  # joined token -> the ids of its two parts
    store: Store
    domain: str
    epoch: int
    folder: Path  # where files are written

    @property
    def changes_nothing(self) -> bool:
        return not self.fim.rate and not self.halves


class Task(NamedTuple):
    number: int
    documents: np.ndarray
    rearranged: np.ndarray  # bool, of each


def rendering(
    *,
    tokenizer: "Tokenizer",
    fim: FillInTheMiddle,
    split_share: float,
    store: Store,
    domain: str,
    epoch: int,
    folder: Path,
) -> Rendering:
    halves = joined_tokens(tokenizer) if split_share > 0 else {}
    return Rendering(tokenizer, fim, split_share, halves, store, domain, epoch, folder)


def write_edition(settings: Rendering, *, processes: Processes, progress: Callable[[int], None]) -> None:
    """Write the files of a domain's edition into its folder, after those that it has already.

    progress: called with the number of tokens of the documents just rendered.
    """
    settings.folder.mkdir(parents=True, exist_ok=True)
    tokens = settings.store.tokens(settings.domain)
    tasks = list(_tasks(settings, tokens))
    missing = [task for task in tasks if not _lengths_path(settings.folder, task.number).exists()]
    for done in processes.map(render, settings, missing):
        progress(done)
    documents = np.concatenate([*(task.documents for task in tasks), np.zeros(0, np.int64)])
    files = [np.load(_lengths_path(settings.folder, task.number)) for task in tasks]
    write_beside(settings.folder / "documents.npy", lambda file: np.save(file, documents))
    lengths = np.concatenate([*files, np.zeros(0, np.int64)])
    write_beside(settings.folder / "lengths.npy", lambda file: np.save(file, lengths))
    text = json.dumps({"files": len(tasks), "dtype": id_type(settings.tokenizer)})
    write_beside(settings.folder / "edition.json", lambda file: file.write(text.encode()))


def read_edition(folder: Path) -> DomainEdition:
    content = json.loads((folder / "edition.json").read_text())
    files = [mapped(shard_path(folder, i), content["dtype"]) for i in range(content["files"])]
    documents, lengths = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("documents", "lengths"))
    return DomainEdition(files, documents, lengths)


def generator(domain: str, epoch: int, purpose: int, document: int = 0) -> np.random.Generator:
    """Random numbers of one use in one epoch (Philox, counter-based)."""
    key, counter = np.array([number(domain), epoch], np.uint64), np.array([0, 0, purpose, document], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def rearranged(domain: str, epoch: int, count: int, rate: float) -> np.ndarray:
    """Which of `count` documents an epoch rearranges: bool [count]."""
    return generator(domain, epoch, CHOICE).random(count) < rate


def joined_tokens(tokenizer: "Tokenizer") -> dict[int, list[int]]:
    """The tokens that join punctuation and line breaks, each with the ids of the two parts."""
    found = {}
    for index, data in enumerate(tokenizer.token_bytes()):
        head = data.rstrip(b"\r\n")
        if len(head) < len(data) and head.strip() and not any(chr(byte).isalnum() for byte in head):
            found[index] = tokenizer.encode_bytes(head) + tokenizer.encode_bytes(data[len(head) :])
    return found


def _tasks(settings: Rendering, tokens: DomainTokens) -> Iterator[Task]:
    chosen = rearranged(settings.domain, settings.epoch, len(tokens.lengths), settings.fim.rate)
    documents = np.arange(len(chosen)) if settings.halves else np.flatnonzero(chosen)
    ends = np.cumsum(tokens.lengths[documents])
    first = 0
    count = 0
    while first < len(documents):
        before = ends[first - 1] if first else 0
        last = max(first + 1, int(np.searchsorted(ends, before + TASK, side="right")))
        yield Task(count, documents[first:last], chosen[documents[first:last]])
        first, count = last, count + 1


def _lengths_path(folder: Path, number: int) -> Path:
    return folder / f"{number:05}.npy"


def render(settings: Rendering, task: Task) -> int:
    """Write the ids of a task's documents into a file; how many tokens they have in the store."""
    tokens = settings.store.tokens(settings.domain)
    token_bytes = settings.tokenizer.token_bytes()
    is_joined = np.zeros(settings.tokenizer.vocab_size, bool)
    is_joined[list(settings.halves)] = True
    lengths: list[int] = []

    def write(file: Any) -> None:
        for document, is_rearranged in zip(task.documents.tolist(), task.rearranged.tolist()):
            ids = slice_of(tokens.shards, int(tokens.starts[document]), int(tokens.lengths[document]))
            length = 0
            random = generator(settings.domain, settings.epoch, SPLITS, document)
            for part in _rearranged(settings, ids, token_bytes, document) if is_rearranged else _blocks(ids):
                if settings.halves:
                    part = _split(part, is_joined, settings, random)
                length += len(part)
                file.write(part.astype(settings.store.dtype).tobytes())
            lengths.append(length)

    write_beside(shard_path(settings.folder, task.number), write)
    write_beside(_lengths_path(settings.folder, task.number), lambda file: np.save(file, np.array(lengths, np.int64)))
    return int(tokens.lengths[task.documents].sum())


def slice_of(arrays: list[np.ndarray], start: int, length: int) -> np.ndarray:
    """A stretch that lies in one of several arrays, addressed as if they lay end to end."""
    for array in arrays:
        if start < len(array):
            return array[start : start + length]
        start -= len(array)
    raise IndexError(f"{start} tokens beyond the end")


def _blocks(ids: np.ndarray) -> Iterator[np.ndarray]:
    return (ids[start : start + BLOCK] for start in range(0, len(ids), BLOCK))


def _rearranged(settings: Rendering, ids: np.ndarray, token_bytes: list[bytes], document: int) -> Iterator[np.ndarray]:
    random = generator(settings.domain, settings.epoch, CUTS, document)
    texts = _text(ids, token_bytes)
    gathered: list[int] = []
    for sequence in rearrange(texts, settings=settings.fim, random=random, tokenizer=settings.tokenizer):
        gathered += sequence
        if len(gathered) > PIECE:
            yield np.array(gathered)
            gathered = []
    yield np.array(gathered, np.int64)


def _text(ids: np.ndarray, token_bytes: list[bytes]) -> Iterator[str]:
    """The text of a document in parts."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for block in _blocks(ids):
        yield decoder.decode(b"".join([token_bytes[index] for index in block.tolist()]))


def _split(tokens: np.ndarray, is_joined: np.ndarray, settings: Rendering, random: np.random.Generator) -> np.ndarray:
    places = np.flatnonzero(is_joined[tokens])
    places = places[random.random(len(places)) < settings.split_share]
    parts = np.split(tokens, np.stack([places, places + 1], axis=1).ravel())
    for i in range(1, len(parts), 2):
        parts[i] = np.array(settings.halves[int(parts[i][0])], np.int64)
    return np.concatenate(parts)
