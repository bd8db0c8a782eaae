"""Survey: the first reading of a corpus, which fixes what is held out before anything is tokenised.

A document is held out if the hash of its group's name, or without a group of its content, is below the share; if none
is, the group with the smallest hash. What is held out of a domain is bounded in bytes: the largest hashes go to
training, and so does every document that is longer than the bound. A source may decide itself; a domain of one
document holds out the end of it.

The second reading drops training documents that repeat held-out ones; `Telling` has the lines that tell.
"""

import functools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import xxhash

from data.documents import Document, HeldOut, LeftOut, parts_of
from data.smallest import SAMPLE, Kept, Sample, Smallest
from data.sources import Source
from data.spool import documents, spool_path, spooled
from data.telling import Telling, write_lines

NAMED = 1000
"""Files and rows left out of a domain that are listed by name; all are counted."""

COLUMNS = ("name", "text", "family", "answer")


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
            for document in spooled(source, spool_path(folder, name)):
                progress(name, reading.take(document))
            again = functools.partial(_again, source, folder, name, longest)
            chosen, found[name] = reading.decide(again)
        everything[name] = chosen
        _write_texts(folder / f"{name}.held_out.parquet", [document._asdict() for document in chosen], COLUMNS)
        _write_texts(folder / f"{name}.sample.parquet", [{"text": text} for text in reading.sample.texts()], ("text",))
    write_lines(folder, [document.text for chosen in everything.values() for document in chosen])
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
    return len(text) if text.isascii() else sum(len(part.encode()) for part in parts_of(text))


def _again(source: Source, folder: Path, name: str, longest: int) -> Iterator[Document]:
    return texts_of(documents(source, folder, name), longest)


class _Reading:
    """What is remembered of one domain while it is read."""

    def __init__(self, *, share: float, held_out_bytes: int, longest: int) -> None:
        self.limit, self.longest = held_out_bytes, longest
        self.threshold = int(share * 2**64)
        self.documents = self.bytes = self.empty = 0
        self.undecided = False
        self.left_out: Counter[str] = Counter()
        self.names: list[tuple[str, str]] = []
        self.sample = Sample()
        self.answers: dict[str, Counter[str]] = defaultdict(Counter)
        self._decided: list[Kept] = []
        self._decided_bytes = 0
        self._beyond: list[int] = []
        self._drawn = Smallest(self.limit)  # below the share
        self._smallest: list[Kept] = []  # the group of the smallest hash
        self._only: tuple[int, int] = (0, 0)  # characters and bytes of the latest document

    def take(self, found: Document | LeftOut) -> int:
        """Remember what is needed of a document; its size in bytes."""
        if isinstance(found, LeftOut):
            self._leave_out(found)
            return 0
        beginning, size, characters, state, blank = [], 0, 0, xxhash.xxh3_64(), True
        for part in parts_of(found.text):
            data = part.encode()
            state.update(data)
            if size <= self.limit or characters < SAMPLE:
                beginning.append(part)
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
        text = "".join(beginning)
        kept = Kept(order, number, size, HeldOut(found.name, text, found.family, found.answer))
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

    def _decide(self, kept: Kept) -> None:
        if self._decided_bytes + kept.size <= self.limit:
            self._decided.append(kept)
            self._decided_bytes += kept.size
        else:
            self._beyond.append(kept.number)

    def _draw(self, kept: Kept) -> None:
        wanted = kept.order < self.threshold and kept.size <= self.limit
        for other in self._drawn.add(kept) if wanted else [kept]:
            self._try_smallest(other)

    def _try_smallest(self, kept: Kept) -> None:
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
            self.sample = Sample()
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

    def _but_not_all(self, drawn: list[Kept]) -> list[Kept]:
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
    for part in parts_of(document.text):
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
