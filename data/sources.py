"""Sources of text: each yields the documents of one domain, as often as it is asked.

A new source is a function that returns a `Source`, named by `_target_` in conf/data/*.yaml.
"""

import fnmatch
import os
import sysconfig
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import fsspec

from data.documents import BadTextError, Document, LeftOut
from data.formats import read
from data.questions import Families, draw, drawn_from
from dsv3.bounds import NonNegativeInt, PositiveFloat, PositiveInt

OnBad = Literal["refuse", "skip"]

VERSION = 1
"""Raised with every change of the code that reads other texts from the same place."""

LONGEST = 256_000_000
"""Bytes of the longest row that is taken, unless data.max_document_bytes says otherwise."""


class Source:
    """The texts of one domain, and their share of the training tokens."""

    def __init__(
        self,
        *,
        weight: float,
        identity: Callable[[], Mapping[str, Any]],
        documents: Callable[[], Iterator[Document | LeftOut]],
        size: Callable[[], int] | None = None,
    ) -> None:
        """`weight`: above 0, relative to the other sources'.

        `identity`: JSON-serialisable, quick to find, equal only where `documents` yields the same, in the same order.
        `size`: bytes that will be read, for the progress bar. None: the documents are not in files; they are made or
        fetched once, and kept.
        """
        if weight <= 0:
            raise ValueError(f"weight={weight} is not above 0 (leave the source out instead)")
        self.weight = weight
        self.identity = identity
        self.documents = documents
        self.size = size


def standard_library(*, weight: PositiveFloat) -> Source:
    """The Python files of the interpreter's own standard library, without tests and without pydoc's topics."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "ensurepip", "pydoc_data"}

    def files() -> list[Path]:
        found = []
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name not in left_out]
            found += [Path(folder, name).relative_to(root) for name in names if name.endswith(".py")]
        return sorted(found)

    def identity() -> Mapping[str, Any]:
        return {"version": VERSION, "files": [(path.as_posix(), (root / path).stat().st_size) for path in files()]}

    def documents() -> Iterator[Document | LeftOut]:
        for path in files():
            try:
                yield Document(path.as_posix(), (root / path).read_text(encoding="utf-8"))
            except UnicodeDecodeError:
                yield LeftOut(path.as_posix(), "broken text", "no UTF-8 text")

    def size() -> int:
        return sum((root / path).stat().st_size for path in files())

    return Source(weight=weight, identity=identity, documents=documents, size=size)


class File(NamedTuple):
    name: str  # relative to the folder that was asked for
    path: str
    size: int
    stamp: str  # changes with the content


def local_files(
    *,
    path: str | None,
    text_column: str,
    weight: PositiveFloat,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    on_bad: OnBad = "refuse",
    max_document_bytes: PositiveInt = LONGEST,
    validation: str | None = None,
) -> Source | None:
    """A file, or the files of a folder and the folders in it: text, JSON lines or arrays, CSV, Parquet or Arrow, each
    also compressed (`data.formats`); on this machine or where fsspec reads (`s3://bucket/folder`).

    A text file is a document; of rows, each is one, in the column `text_column`. Hidden files are passed over, binary
    ones left out and counted. include, exclude: patterns of file names, such as `*.py` or `docs/*`. on_bad: what is
    done about broken text, `refuse` or `skip` (left out and counted). max_document_bytes: longer rows are left out.
    validation: a file or folder that is held out, instead of a share of `path`. None where `path` is None.

    Raises:
        ValueError: a path is missing or holds no files, or a file cannot be read.
    """
    if path is None:
        return None

    def chosen(place: str) -> list[File]:
        found = [file for file in listed(place) if matching(file.name, include, exclude)]
        if not found:
            raise ValueError(f"path={place!r} holds no files that include={list(include)} admits and exclude does not")
        return found

    def files() -> Sequence[tuple[File, bool | None]]:
        """Each file, and whether it is held out: one below `path` that is for validation is not for training."""
        if validation is None:
            return [(file, None) for file in chosen(path)]
        held_out = chosen(validation)
        apart = {file.path for file in held_out}
        return [(file, False) for file in chosen(path) if file.path not in apart] + [(file, True) for file in held_out]

    def identity() -> Mapping[str, Any]:
        stamps = [(printable(file.path), file.size, file.stamp, held_out) for file, held_out in files()]
        settings = [text_column, on_bad, max_document_bytes]
        return {"version": VERSION, "settings": settings, "files": stamps}

    def documents() -> Iterator[Document | LeftOut]:
        for file, held_out in files():
            settings: dict[str, Any] = {"name": file.name, "path": printable(file.path)}
            settings |= {"column": text_column, "longest": max_document_bytes}
            for found in _accepted(partial(opened, file.path), on_bad, **settings):
                yield found if isinstance(found, LeftOut) else found._replace(held_out=held_out)

    def size() -> int:
        return sum(file.size for file, _ in files())

    return Source(weight=weight, identity=identity, documents=documents, size=size)


def opened(path: str) -> Any:
    return fsspec.open(path).open() if "://" in path else open(path, "rb")


def printable(name: str) -> str:
    """A name need not be text: its other bytes are written out."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _accepted(open_file: Callable[[], IO[bytes]], on_bad: OnBad, **settings: Any) -> Iterator[Document | LeftOut]:
    """What a file gives, by what is to be done about broken text."""

    def bad(error: BadTextError) -> LeftOut:
        if on_bad == "refuse":
            raise BadTextError(f"{error}; on_bad=skip leaves it out, and so does exclude") from error
        return LeftOut(settings["name"], "broken text", str(error))

    try:
        for found in read(open_file, **settings):
            yield bad(found) if isinstance(found, BadTextError) else found
    except BadTextError as error:
        yield bad(error)


def matching(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    def any_of(patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern.removeprefix("**/")) for pattern in patterns)

    return any_of(include) and not any_of(exclude)


def listed(path: str) -> list[File]:
    """The files at a path, in the order of their names, but for hidden ones."""
    found = _on_disk(Path(path).expanduser()) if "://" not in path else _elsewhere(path)
    visible = (file for file in found if not any(part.startswith(".") for part in file.name.split("/")))
    return sorted(visible, key=lambda file: file.name)


def _on_disk(root: Path) -> Iterator[File]:
    if not root.exists():
        raise ValueError(f"path={str(root)!r} does not exist (python -m data fetch makes what is in .cache/corpus)")
    of_folder = (Path(folder, name) for folder, _, names in os.walk(root) for name in names)
    for path in of_folder if root.is_dir() else [root]:
        name = path.relative_to(root).as_posix() if root.is_dir() else path.name.lstrip(".")
        if path.is_file():  # no socket, and no link to nowhere
            stat = path.stat()
            yield File(printable(name), str(path.absolute()), stat.st_size, str(stat.st_mtime_ns))


STAMPS = ("ETag", "etag", "mtime", "LastModified", "created", "blob_id")
"""What file systems tell of a file that changes with it; the last of them Hugging Face's Hub."""


def _elsewhere(path: str) -> Iterator[File]:
    try:
        system, root = fsspec.core.url_to_fs(path)
        if not system.exists(root):
            raise ValueError(f"path={path!r} does not exist")
        found = {root: system.info(root)} if system.isfile(root) else system.find(root, detail=True)
    except (ImportError, OSError) as error:  # such as s3fs, which is not installed
        raise ValueError(f"path={path!r}: {error}") from error
    for place, info in found.items():
        name = place.removeprefix(root).lstrip("/") or place.rpartition("/")[2]
        changed = [str(info[key]) for key in STAMPS if key in info]
        yield File(name, system.unstrip_protocol(place), info.get("size") or 0, " ".join(changed))


def hub(
    *,
    name: str,
    config: str | None,
    revision: str | None,
    split: str,
    text_column: str,
    limit: int | None,
    weight: PositiveFloat,
) -> Source:
    """A dataset of the Hugging Face Hub, streamed (or a folder in its format): its first `limit` rows (null: all)."""
    arguments = {"name": name, "config": config, "revision": revision, "split": split, "column": text_column}

    def identity() -> Mapping[str, Any]:
        folder = Path(name).expanduser()
        stamps = [(file.name, file.size, file.stamp) for file in _on_disk(folder)] if folder.is_dir() else []
        return {**arguments, "limit": limit, "files": sorted(stamps)}

    def documents() -> Iterator[Document | LeftOut]:
        import datasets

        rows = datasets.load_dataset(name, config, split=split, revision=revision, streaming=True)
        for i, row in enumerate(rows if limit is None else rows.take(limit)):
            if text_column not in row:
                raise ValueError(f"text_column={text_column!r} is not among the columns of {name}: {sorted(row)}")
            if row[text_column] is not None and not isinstance(row[text_column], str):
                raise ValueError(f"text_column={text_column!r} in row {i + 1} of {name} is not text")
            yield Document(f"{name}:{i}", row[text_column] or "")

    return Source(weight=weight, identity=identity, documents=documents)


def reasoning(*, families: Families, held_out: NonNegativeInt, weight: PositiveFloat) -> Source:
    """Questions of reasoning-gym's generators (`data.questions`), written `Question: {question}\\nAnswer: {answer}`.

    Raises:
        ValueError: an unknown generator or setting.
    """

    def documents() -> Iterator[Document | LeftOut]:
        for drawn in draw(families, held_out=held_out):
            yield Document(
                f"{drawn.family}/{drawn.question}",
                f"Question: {drawn.question}\nAnswer: {drawn.answer}",
                held_out=drawn.held_out,
                family=drawn.family,
                answer=drawn.answer,
            )

    return Source(weight=weight, identity=lambda: drawn_from(families, held_out=held_out), documents=documents)
