"""Store: the training documents of a corpus as token ids, in shards on disk that are read through memory maps.

Each document is `<bos> text <eos>`; one of over 1,000,000 characters is tokenised in pieces (`data.documents.pieces`),
and that is what its ids are. A shard ends with a document; it is written beside its place and renamed, so that a killed
preparation goes on after the last whole one. Training documents that repeat held-out ones are in the shards and left
out of the index.
"""

import functools
import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import xxhash

from data.documents import Document, parts_of, pieces
from data.processes import Processes
from data.shards import Encoded, Shards, Text, mapped, read_facts, shard_path, write_beside
from data.sources import Source
from data.spool import documents
from data.survey import DomainSurvey, Survey, of_source, texts_of
from data.telling import Telling

if TYPE_CHECKING:
    from dsv3.contracts import Tokenizer

TEXTS, CHARACTERS = 10_000, 200_000
"""Tokenised at a time, at most about so many. What the tokenizer holds of them is 40 times their ids: with a million
characters it leaves the processor's caches, and takes a third longer."""


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
        shards = Shards(folder / name, dtype)
        with of_source(name):
            texts = texts_of(documents(source, survey.folder, name), longest)
            batches = _batches(_training(texts, found, shards.consumed), survey.telling())
            for characters in shards.write(_encoded(batches, settings, processes)):
                progress(name, characters)


def read_store(folder: Path) -> Store:
    content = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    domains = {name: DomainCounts(**counts) for name, counts in content["domains"].items()}
    return Store(folder.name, folder, content["dtype"], domains)


def id_type(tokenizer: "Tokenizer") -> str:
    return "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"


class Encoding(NamedTuple):
    """How texts are tokenised; sent to the processes."""

    tokenizer: "Tokenizer"
    telling: Path | None  # the folder of `Telling`; None: nothing is compared with held-out lines
    dtype: str


def encode(settings: Encoding, batch: list[Text]) -> Encoded:
    """Tokenise consecutive texts."""
    tokenizer = settings.tokenizer
    token_bytes = tokenizer.token_bytes()
    telling = _telling(settings.telling) if settings.telling else None
    parts: list[np.ndarray] = []
    found, changed = [], -1
    for i, ids in enumerate(tokenizer.encode_batch([each.text for each in batch])):
        each = batch[i]
        if changed < 0 and b"".join(map(token_bytes.__getitem__, ids)) != each.text.encode():
            changed = i
        if telling is not None and len(telling.lines):
            found.append(telling.found(each.text))
        whole = [tokenizer.bos] * each.begins + ids + [tokenizer.eos] * each.ends
        parts.append(np.array(whole, settings.dtype))
    texts = np.repeat(np.arange(len(found)), [len(lines) for lines in found])
    lines = np.concatenate([*found, np.zeros(0, np.int32)])
    return Encoded(np.concatenate(parts), [len(part) for part in parts], texts, lines, changed)


def _encoded(
    batches: Iterator[list[Text]], settings: Encoding, processes: Processes
) -> Iterator[tuple[list[Text], Encoded]]:
    """Batches of texts with their ids, in order."""
    sent: deque[list[Text]] = deque()

    def tasks() -> Iterator[list[Text]]:
        for batch in batches:
            sent.append(batch)
            yield batch

    for encoded in processes.map(encode, settings, tasks()):
        yield sent.popleft(), encoded


@functools.lru_cache(maxsize=1)
def _telling(folder: Path) -> Telling:
    return Telling(folder)


class _Numbered(NamedTuple):
    number: int
    document: Document


def _training(documents: Iterator[Document], found: DomainSurvey, consumed: int) -> Iterator[_Numbered]:
    """The documents that are trained on, from number `consumed` on."""
    left_out = {*found.held_out, *found.beyond}
    for number, document in enumerate(documents):
        if number >= consumed and number not in left_out:
            if found.split_at is not None:
                document = document._replace(text=_beginning(document.text, found.split_at))
            yield _Numbered(number, document)


def _beginning(text: str | Iterable[str], characters: int) -> Iterator[str]:
    for part in parts_of(text):
        yield part[:characters]
        characters -= len(part)
        if characters <= 0:
            return


def _batches(documents: Iterator[_Numbered], telling: Telling) -> Iterator[list[Text]]:
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
            is_copy = ends and telling.is_held_out(content.intdigest())
            batch.append(Text(piece, begins, ends, is_copy, numbered.document.name, numbered.number))
            characters += len(piece)
            begins = False
            if characters >= CHARACTERS or len(batch) >= TEXTS:
                yield batch
                batch, characters = [], 0
            piece = following
    if batch:
        yield batch


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
