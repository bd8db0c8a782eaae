"""Survey: the first reading of a corpus, which fixes what is held out before anything is tokenised.

A document is held out if the hash of its group's name, or without a group of its content, is below the share; if none
is, the group with the smallest hash. What is held out of a domain is bounded in bytes: the largest hashes go to
training, and so does every document that is longer than the bound. A source may decide itself; a domain of one
document holds out the end of it.

The second reading drops training documents that repeat held-out ones; `Telling` has the lines that tell.
"""

import functools
import heapq
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet
import xxhash

from data.documents import Document, LeftOut
from data.sources import Source

TRIVIAL = 12
"""Lines of fewer characters (brackets, `return`, `else:`) tell nothing about where a text comes from."""

COMMON = 20
"""A line that more training documents than this have tells nothing either."""

SAMPLE = 10_000_000
"""Characters of training text of each domain that are kept for training a tokenizer."""

NAMED = 1000
"""Files and rows left out of a domain that are listed by name; all are counted."""

SPOOL = pyarrow.schema(
    [(name, pyarrow.bool_() if name == "held_out" else pyarrow.string()) for name in Document._fields]
)
SPOOLED = 4_000_000
"""Characters written at a time."""

COLUMNS = ("name", "text", "family", "answer")


class HeldOut(NamedTuple):
    """A held-out document."""

    name: str
    text: str
    family: str
    answer: str


class DomainSurvey(NamedTuple):
    """What the first reading found in one domain; JSON-serialisable."""

    documents: int  # that have text
    bytes: int  # of their text, in UTF-8
    empty: int
    held_out: list[int]  # numbers of the documents with text that are held out, in order
    beyond: list[int]  # numbers of those that their source holds out and that held_out_bytes leaves no room for
    held_out_bytes: int
    split_at: int | None  # of a domain of one document: the characters that are trained on
    left_out: dict[str, int]  # reason -> number of files and rows
    left_out_names: list[tuple[str, str]]  # the first of them, and what is wrong with each
    majority: dict[str, str]  # family of questions -> most frequent answer where the source holds out nothing


class Survey(NamedTuple):
    """The corpus as the first reading found it, in a folder."""

    key: str  # equal for equal texts in an equal split
    folder: Path
    domains: dict[str, DomainSurvey]

    def held_out(self, domain: str) -> list[HeldOut]:
        """Its held-out documents in the order of a hash; those of a group in the order in which they were read."""
        return read_held_out(self.folder / f"{domain}.held_out.parquet")

    def sample(self, domain: str) -> list[str]:
        """Beginnings of its training documents, in the order of a hash, of `SAMPLE` characters together."""
        return pyarrow.parquet.read_table(self.folder / f"{domain}.sample.parquet")["text"].to_pylist()

    def telling(self) -> "Telling":
        return Telling(self.folder)


def survey(
    sources: Mapping[str, Source],
    folder: Path,
    *,
    share: float,
    held_out_bytes: int,
    longest: int,
    progress: Callable[[str, int], None] = lambda domain, size: None,
) -> None:
    """Read every source once and write what `Survey` reads into an empty folder.

    longest: bytes from which on a document that comes as one string is left out. progress: called with a domain and
    the bytes of text just read.

    Raises:
        ValueError: a source is at fault (its key is named), or gives no training or no held-out text.
    """
    found, everything = {}, {}
    for name, source in sources.items():
        with of_source(name):
            reading = _Reading(share=share, held_out_bytes=held_out_bytes, longest=longest)
            for document in _written(source, _spool(folder, name)):
                progress(name, reading.take(document))
            again = functools.partial(_again, source, folder, name, longest)
            chosen, found[name] = reading.decide(again)
        everything[name] = chosen
        _write_texts(folder / f"{name}.held_out.parquet", [document._asdict() for document in chosen], COLUMNS)
        _write_texts(folder / f"{name}.sample.parquet", [{"text": text} for text in reading.sample.texts()], ("text",))
    _write_lines(folder, everything)
    text = json.dumps({name: domain._asdict() for name, domain in found.items()})
    (folder / "survey.json").write_text(text, encoding="utf-8")


def read_survey(folder: Path) -> Survey:
    content = json.loads((folder / "survey.json").read_text(encoding="utf-8"))
    return Survey(folder.name, folder, {name: DomainSurvey(**domain) for name, domain in content.items()})


def read_held_out(file: Path) -> list[HeldOut]:
    return [HeldOut(**row) for row in pyarrow.parquet.read_table(file).to_pylist()]


class of_source:  # noqa: N801 (used like a function)
    """Names the key of the source in what goes wrong with it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, ValueError):
            raise ValueError(f"data.sources.{self.name}: {error}") from error


def texts_of(documents: Iterable[Document | LeftOut], longest: int) -> Iterator[Document]:
    """The documents that have text and are not too long: those that are numbered."""
    for document in documents:
        if isinstance(document, LeftOut):
            continue
        if isinstance(document.text, str):
            if document.text.strip() and _bytes_of(document.text) <= longest:
                yield document
            continue
        parts = iter(document.text)
        begun: list[str] = []
        for part in parts:
            begun.append(part)
            if part.strip():
                yield document._replace(text=_joined(begun, parts))
                break


def _joined(begun: list[str], rest: Iterator[str]) -> Iterator[str]:
    yield from begun
    yield from rest


def _bytes_of(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


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


def documents(source: Source, folder: Path, domain: str) -> Iterator[Document | LeftOut]:
    """What a source yields: read anew, or where it made or fetched it for the survey in `folder`, what was kept."""
    spool = _spool(folder, domain)
    if not spool.exists():
        yield from source.documents()
        return
    for batch in pyarrow.parquet.ParquetFile(spool).iter_batches(batch_size=100, use_threads=False):
        yield from (Document(**row) for row in batch.to_pylist())


def _spool(folder: Path, domain: str) -> Path:
    return folder / f"{domain}.documents.parquet"


def _written(source: Source, spool: Path) -> Iterator[Document | LeftOut]:
    """What a source yields; kept in a file if it is not in files already."""
    if source.size is not None:
        yield from source.documents()
        return
    with pyarrow.parquet.ParquetWriter(spool, SPOOL, compression="zstd") as file:
        rows: list[dict[str, Any]] = []
        characters = 0
        for document in source.documents():
            if isinstance(document, Document):
                text = document.text if isinstance(document.text, str) else "".join(document.text)
                document = document._replace(text=text)
                rows.append(document._asdict())
                characters += len(text)
            yield document
            if characters > SPOOLED or len(rows) > 10_000:
                file.write_table(pyarrow.Table.from_pylist(rows, SPOOL))
                rows, characters = [], 0
        file.write_table(pyarrow.Table.from_pylist(rows, SPOOL))


def _again(source: Source, folder: Path, name: str, longest: int) -> Iterator[Document]:
    return texts_of(documents(source, folder, name), longest)


class _Sample:
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


class _Kept(NamedTuple):
    """A document that may be held out."""

    order: int  # its hash, or its group's
    number: int
    size: int
    document: HeldOut


class _Reading:
    """What is remembered of one domain while it is read."""

    def __init__(self, *, share: float, held_out_bytes: int, longest: int) -> None:
        self.limit, self.longest = held_out_bytes, longest
        self.threshold = int(share * 2**64)
        self.documents = self.bytes = self.empty = 0
        self.undecided = False
        self.left_out: Counter[str] = Counter()
        self.names: list[tuple[str, str]] = []
        self.sample = _Sample()
        self.answers: dict[str, Counter[str]] = defaultdict(Counter)
        self._decided: list[_Kept] = []
        self._decided_bytes = 0
        self._beyond: list[int] = []
        self._drawn = _Smallest(self.limit)  # below the share
        self._smallest: list[_Kept] = []  # the group of the smallest hash
        self._only: tuple[int, int] = (0, 0)  # characters and bytes of the latest document

    def take(self, found: Document | LeftOut) -> int:
        """Remember what is needed of a document; its size in bytes."""
        if isinstance(found, LeftOut):
            self._leave_out(found)
            return 0
        parts, size, characters, state, blank = [], 0, 0, xxhash.xxh3_64(), True
        for part in [found.text] if isinstance(found.text, str) else found.text:
            data = part.encode()
            state.update(data)
            if size <= self.limit or characters < SAMPLE:
                parts.append(part)
            size += len(data)
            characters += len(part)
            blank = blank and not part.strip()
        if blank:
            self.empty += 1
            return 0
        if isinstance(found.text, str) and size > self.longest:
            self._leave_out(LeftOut(found.name, "too long", f"a document of over {self.longest:,} bytes"))
            return size
        number = self.documents
        self.documents += 1
        self.bytes += size
        self._only = (characters, size)
        if found.family and not found.held_out:
            self.answers[found.family][found.answer] += 1
        content = state.intdigest()
        order = xxhash.xxh3_64_intdigest(found.group.encode()) if found.group else content
        text = "".join(parts)
        kept = _Kept(order, number, size, HeldOut(found.name, text, found.family, found.answer))
        if found.held_out:
            self._decide(kept)
        elif found.held_out is None:
            self.undecided = True
            self._draw(kept)
        else:
            self.sample.offer(content, text)
        return size

    def _leave_out(self, found: LeftOut) -> None:
        self.left_out[found.reason] += 1
        if len(self.names) < NAMED:
            self.names.append((found.name, found.detail or found.reason))

    def _decide(self, kept: _Kept) -> None:
        if self._decided_bytes + kept.size <= self.limit:
            self._decided.append(kept)
            self._decided_bytes += kept.size
        else:
            self._beyond.append(kept.number)

    def _draw(self, kept: _Kept) -> None:
        wanted = kept.order < self.threshold and kept.size <= self.limit
        for other in self._drawn.add(kept) if wanted else [kept]:
            self._try_smallest(other)

    def _try_smallest(self, kept: _Kept) -> None:
        """Keep the group of the smallest hash, in case that nothing is drawn."""
        smallest = self._smallest
        if self._drawn or kept.size > self.limit or (smallest and kept.order > smallest[0].order):
            self.sample.offer(kept.order, kept.document.text)
        elif smallest and kept.order == smallest[0].order:
            smallest.append(kept)
        else:
            self._smallest = [kept]
            for other in smallest:
                self.sample.offer(other.order, other.document.text)

    def decide(self, again: Callable[[], Iterator[Document]]) -> tuple[list[HeldOut], DomainSurvey]:
        """The held-out documents and what is found. again: reads the documents once more."""
        for other in self._drawn.leave(self.limit - self._decided_bytes):
            self._try_smallest(other)
        split_at = None
        if self.documents == 1 and self.undecided:
            characters, size = self._only
            (ends,) = [_ends(document, self._head(characters, size), self.limit) for document in again()]
            self.sample = _Sample()
            self.sample.offer(0, ends.beginning)
            split_at, numbers = ends.split_at, []
            documents = [HeldOut(ends.name, ends.end, "", "")] if ends.beginning.strip() and ends.end.strip() else []
        else:
            drawn = self._drawn.kept
            if not drawn and not self._decided and sum(kept.size for kept in self._smallest) <= self.limit:
                drawn = self._smallest
            else:
                for other in self._smallest:
                    self.sample.offer(other.order, other.document.text)
            chosen = self._decided + self._but_not_all(drawn)
            unique = {kept.document.text: kept for kept in sorted(chosen, reverse=True)}
            numbers = sorted(kept.number for kept in chosen)
            documents = [kept.document for kept in sorted(unique.values())]
        training = self.documents - len(numbers) - len(self._beyond)
        if not documents or training < 1:
            raise ValueError(self._lacking(documents))
        return documents, DomainSurvey(
            documents=self.documents,
            bytes=self.bytes,
            empty=self.empty,
            held_out=numbers,
            beyond=self._beyond,
            held_out_bytes=sum(_bytes_of(document.text) for document in documents),
            split_at=split_at,
            left_out=dict(self.left_out),
            left_out_names=self.names,
            majority={family: counts.most_common(1)[0][0] for family, counts in self.answers.items()},
        )

    def _but_not_all(self, drawn: list[_Kept]) -> list[_Kept]:
        """Give the group with the largest hash to training if nothing else is left for it."""
        largest = max((kept.order for kept in drawn), default=0)
        others = [kept for kept in drawn if kept.order < largest]
        held_out = len(self._decided) + len(self._beyond)
        if held_out + len(drawn) < self.documents or not (others or self._decided):
            return drawn
        for kept in drawn:
            if kept.order == largest:
                self.sample.offer(kept.order, kept.document.text)
        return others

    def _head(self, characters: int, size: int) -> int:
        """Characters of the only document that are trained on, before the line is finished."""
        share = min(self.threshold / 2**64, self.limit / size)
        return int(characters * (1 - share))

    def _lacking(self, documents: list[HeldOut]) -> str:
        if not self.documents:
            left_out = ", ".join(f"{count} {reason}" for reason, count in self.left_out.items())
            return "it gives no text" + (f" ({left_out} left out)" if left_out else "")
        if not documents and not self.undecided and not self._beyond:
            return f"it holds out none of its {self.documents} documents"
        if not documents and self.documents == 1 and self.undecided:
            return "nothing can be held out of its only document: it is too short, or data.held_out_bytes is"
        if not documents:
            return (
                f"nothing can be held out of its {self.documents} documents: none, or no group of them, has at most "
                f"data.held_out_bytes={self.limit:,} bytes"
            )
        return "it gives no training documents: all of them are held out"


class _Smallest:
    """Documents of the smallest hashes, whole groups, up to a number of bytes: the same in whatever order they come."""

    def __init__(self, limit: int) -> None:
        self._heap: list[tuple[int, int, _Kept]] = []  # the largest hash first
        self._limit = limit
        self._bytes = 0
        self._below = 2**64  # the smallest hash that there was no room for

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def kept(self) -> list[_Kept]:
        return [kept for _, _, kept in self._heap]

    def add(self, kept: _Kept) -> list[_Kept]:
        """Take a document; what goes instead, or itself."""
        if kept.order >= self._below:
            return [kept]
        heapq.heappush(self._heap, (-kept.order, kept.number, kept))
        self._bytes += kept.size
        return self.leave(self._limit)

    def leave(self, limit: int) -> list[_Kept]:
        """Keep no more than `limit` bytes; what goes."""
        gone: list[_Kept] = []
        while self._bytes > limit:
            self._below = -self._heap[0][0]
            while self._heap and -self._heap[0][0] == self._below:
                gone.append(heapq.heappop(self._heap)[2])
                self._bytes -= gone[-1].size
        return gone


class _Ends(NamedTuple):
    """The only document of a domain in two."""

    name: str
    beginning: str  # at most `SAMPLE` characters
    split_at: int  # characters of the part that is trained on
    end: str


def _ends(document: Document, characters: int, limit: int) -> _Ends:
    """Cut a document where the line that character number `characters` is in ends, or else there.

    The end has at most `limit` bytes: where it had more, it begins later.
    """
    beginning, rest, seen = "", "", 0
    for part in [document.text] if isinstance(document.text, str) else document.text:
        beginning += part[: SAMPLE - len(beginning)]
        rest += part[max(0, characters - seen) :]
        seen += len(part)
    rest = rest.encode()[-limit:].decode(errors="ignore")  # of a character cut in two, what is left is no character
    characters = seen - len(rest)
    of_line = rest.find("\n") + 1
    cut = of_line if rest[of_line:].strip() else 0
    split_at = characters + cut
    return _Ends(document.name, beginning[:split_at], split_at, rest[cut:])


def _write_texts(file: Path, rows: list[dict[str, Any]], columns: Iterable[str]) -> None:
    table = pyarrow.table({name: pyarrow.array([row[name] for row in rows], pyarrow.string()) for name in columns})
    pyarrow.parquet.write_table(table, file, compression="zstd")


def _write_lines(folder: Path, held_out: Mapping[str, list[HeldOut]]) -> None:
    """The lines of all held-out documents, for `Telling`."""
    texts = [document.text for documents in held_out.values() for document in documents]
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
