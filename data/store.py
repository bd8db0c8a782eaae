"""Store: the training documents of a corpus as token ids, in shards on disk that are read through memory maps.

Each document is `<bos> text <eos>`; one of over 1,000,000 characters is tokenised in pieces (`data.documents.pieces`),
and that is what its ids are. A shard ends with a document; it is written beside its place and renamed, so that a killed
preparation goes on after the last whole one. Training documents that repeat held-out ones are in the shards and left
out of the index.
"""

import functools
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import xxhash

from data.documents import PIECE, Document, pieces
from data.processes import Processes
from data.sources import Source
from data.survey import COMMON, Survey, Telling, documents, of_source, texts_of

if TYPE_CHECKING:
    from dsv3.contracts import Tokenizer

SHARD = 32_000_000
"""Tokens from which on a shard is closed."""

SMALL = 1 << 16
"""Bytes up to which a file is read: a process can map only so many."""

TEXTS = 10_000
"""Texts tokenised at a time at most, and about PIECE characters."""


class DomainTokens(NamedTuple):
    """The training documents of a domain. Token ids are addressed as if the shards lay end to end."""

    shards: list[np.ndarray]  # uint16 or uint32, memory-mapped
    starts: np.ndarray  # int64 [documents], addresses, memory-mapped
    lengths: np.ndarray  # int64 [documents], in tokens, BOS and EOS among them, memory-mapped


class DomainCounts(NamedTuple):
    """What the store keeps of a domain; JSON-serialisable."""

    documents: int
    tokens: int
    shards: int
    copies: int  # training documents left out because their text is held out
    near_duplicates: int  # those left out because they have half of a held-out document's telling lines
    changed: str  # name of the first document that its token ids do not give back; "": all do


class Store(NamedTuple):
    key: str
    folder: Path
    dtype: str  # of token ids
    domains: dict[str, DomainCounts]

    def tokens(self, domain: str) -> DomainTokens:
        paths = [shard_path(self.folder / domain, i) for i in range(self.domains[domain].shards)]
        starts, lengths = (
            np.load(self.folder / f"{domain}.{part}.npy", mmap_mode="r") for part in ("starts", "lengths")
        )
        return DomainTokens([mapped(path, self.dtype) for path in paths], starts, lengths)


def write_shards(
    folder: Path,
    *,
    survey: Survey,
    sources: Mapping[str, Source],
    tokenizer: "Tokenizer",
    longest: int,
    processes: Processes,
    progress: Callable[[str, int], None],
) -> None:
    """Write the shards of the store into `folder`, after those that it has already. `write_index` makes it a store.

    progress: called with a domain and the number of characters just tokenised.

    Raises:
        ValueError: a source is at fault.
    """
    dtype = id_type(tokenizer)
    for name, source in sources.items():
        found = survey.domains[name]
        settings = Encoding(tokenizer, survey.folder if found.split_at is None else None, dtype)
        shards = _Shards(folder / name, dtype)
        with of_source(name):
            texts = texts_of(documents(source, survey.folder, name), longest)
            training = _training(texts, found, shards.consumed, survey.telling())
            for characters in shards.write(training, settings, processes):
                progress(name, characters)


def read_store(folder: Path) -> Store:
    content = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    domains = {name: DomainCounts(**counts) for name, counts in content["domains"].items()}
    return Store(folder.name, folder, content["dtype"], domains)


def id_type(tokenizer: "Tokenizer") -> str:
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


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


class Encoding(NamedTuple):
    """How texts are tokenised; sent to the processes."""

    tokenizer: "Tokenizer"
    telling: Path | None  # the folder of `Telling`; None: nothing is compared with held-out lines
    dtype: str


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


def encode(settings: Encoding, batch: list[Text]) -> Encoded:
    """Tokenise consecutive texts."""
    tokenizer = settings.tokenizer
    token_bytes = _token_bytes(tokenizer)
    telling = _telling(settings.telling) if settings.telling else None
    parts: list[np.ndarray] = []
    found, changed = [], -1
    for i, ids in enumerate(tokenizer.encode_batch([each.text for each in batch])):
        each = batch[i]
        if changed < 0 and b"".join([token_bytes[index] for index in ids]) != each.text.encode():
            changed = i
        if telling is not None and len(telling.lines):
            found.append(telling.found(each.text))
        whole = [tokenizer.bos] * each.begins + ids + [tokenizer.eos] * each.ends
        parts.append(np.array(whole, settings.dtype))
    texts = np.repeat(np.arange(len(found)), [len(lines) for lines in found])
    lines = np.concatenate([*found, np.zeros(0, np.int32)])
    return Encoded(np.concatenate(parts), [len(part) for part in parts], texts, lines, changed)


def _token_bytes(tokenizer: "Tokenizer") -> list[bytes]:
    kept = _KEPT.get(id(tokenizer))
    if kept is None or kept[0] is not tokenizer:
        _KEPT.clear()
        kept = _KEPT[id(tokenizer)] = (tokenizer, tokenizer.token_bytes())
    return kept[1]


_KEPT: "dict[int, tuple[Tokenizer, list[bytes]]]" = {}
"""The latest tokenizer's bytes of tokens."""


@functools.lru_cache(maxsize=1)
def _telling(folder: Path) -> Telling:
    return Telling(folder)


class _Numbered(NamedTuple):
    number: int
    document: Document
    is_copy: Callable[[int], bool]


def _training(documents: Iterator[Document], found: Any, consumed: int, telling: Telling) -> Iterator[_Numbered]:
    """The documents that are trained on, from number `consumed` on."""
    left_out = {*found.held_out, *found.beyond}
    for number, document in enumerate(documents):
        if number >= consumed and number not in left_out:
            if found.split_at is not None:
                document = document._replace(text=_beginning(document.text, found.split_at))
            yield _Numbered(number, document, telling.is_held_out)


def _beginning(text: str | Iterable[str], characters: int) -> Iterator[str]:
    for part in [text] if isinstance(text, str) else text:
        yield part[:characters]
        characters -= len(part)
        if characters <= 0:
            return


def _batches(documents: Iterator[_Numbered]) -> Iterator[list[Text]]:
    """Texts to be tokenised together; they end with a document, unless it is longer than a piece."""
    batch: list[Text] = []
    characters = 0
    for numbered in documents:
        content, begins = xxhash.xxh3_64(), True
        of_document = pieces(numbered.document.text)
        piece = next(of_document, None)
        while piece is not None:
            following = next(of_document, None)
            content.update(piece.encode())
            ends = following is None
            is_copy = ends and numbered.is_copy(content.intdigest())
            batch.append(Text(piece, begins, ends, is_copy, numbered.document.name, numbered.number))
            characters += len(piece)
            begins = False
            if characters >= PIECE or len(batch) >= TEXTS:
                yield batch
                batch, characters = [], 0
            piece = following
    if batch:
        yield batch


class _Shards:
    """The shards of one domain, those there are and those to come."""

    def __init__(self, folder: Path, dtype: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.dtype = folder, dtype
        self.count = 0
        while _facts_path(folder, self.count).exists():
            self.count += 1
        self.consumed = int(read_facts(folder, self.count - 1)["consumed"]) if self.count else 0

    def write(self, documents: Iterator[_Numbered], settings: Encoding, processes: Processes) -> Iterator[int]:
        """Write the documents in shards; yields the characters of each batch once it is written."""
        sent: deque[list[Text]] = deque()

        def tasks() -> Iterator[list[Text]]:
            for batch in _batches(documents):
                sent.append(batch)
                yield batch

        shard = None
        for encoded in processes.map(encode, settings, tasks()):
            batch = sent.popleft()
            shard = shard or _Shard(shard_path(self.folder, self.count), self.dtype)
            shard.add(batch, encoded)
            if batch[-1].ends and shard.tokens >= SHARD:
                self._close(shard)
                shard = None
            yield sum(len(each.text) for each in batch)
        if shard is not None:
            self._close(shard)

    def _close(self, shard: "_Shard") -> None:
        shard.close(_facts_path(self.folder, self.count))
        self.count += 1


class _Shard:
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


def write_index(folder: Path, *, survey: Survey, names: list[str], dtype: str) -> None:
    """Leave out what repeats held-out text, and say where the other documents are.

    Raises:
        ValueError: a domain is left without training documents.
    """
    lengths, copies, documents, lines, changed, shards = {}, {}, [], [], {}, {}
    total = 0
    for name in names:
        shards[name] = len(list((folder / name).glob("*.npz")))
        facts = [read_facts(folder / name, i) for i in range(shards[name])]
        counts = [len(each["lengths"]) for each in facts]
        firsts = np.cumsum([0, *counts])[:-1]
        empty = [np.zeros(0, np.int64)]
        lengths[name] = np.concatenate([*(each["lengths"] for each in facts), *empty])
        copies[name] = np.concatenate([*(each["copies"] + first for each, first in zip(facts, firsts)), *empty])
        documents += [each["line_documents"] + first + total for each, first in zip(facts, firsts)]
        lines += [each["lines"] for each in facts]
        changed[name] = next((str(each["changed"]) for each in facts if str(each["changed"])), "")
        total += len(lengths[name])
    dropped = survey.telling().near_duplicates(
        np.concatenate([*documents, np.zeros(0, np.int64)]), np.concatenate([*lines, np.zeros(0, np.int32)])
    )
    domains, first = {}, 0
    for name in names:
        kept = np.ones(len(lengths[name]), bool)
        near = dropped[(dropped >= first) & (dropped < first + len(kept))] - first
        kept[near] = False
        kept[copies[name]] = False
        if not kept.any():
            raise ValueError(f"data.sources.{name}: all training documents nearly repeat held-out ones")
        starts = np.cumsum(np.r_[0, lengths[name]])[:-1][kept]
        for part, array in (("starts", starts), ("lengths", lengths[name][kept])):
            write_beside(folder / f"{name}.{part}.npy", functools.partial(np.save, arr=array))
        domains[name] = DomainCounts(
            documents=int(kept.sum()),
            tokens=int(lengths[name][kept].sum()),
            shards=shards[name],
            copies=len(copies[name]),
            near_duplicates=len(np.setdiff1d(near, copies[name])),
            changed=changed[name],
        )._asdict()
        first += len(kept)
    text = json.dumps({"dtype": dtype, "domains": domains})
    write_beside(folder / "index.json", lambda file: file.write(text.encode()))
