"""Sources of examples: rows of JSON that conversations, preferences and prompts are made of.

A row is a mapping, as its kind of data describes it (`data.conversations`, `data.preferences`, `data.prompts`). It may
also have `held_out`, true or false, where the source itself decides.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import IO, Any, NamedTuple

import pyarrow
import pyarrow.parquet

from data.documents import BadTextError
from data.formats import decompressed, text_parts
from data.json_rows import CHUNK, TOO_LONG, elements, lines
from data.sources import VERSION, File, listed, opened, printable

LONGEST = 2_000_000
"""Bytes of a row, or twice as many: more than the longest contexts hold. Tokenizing takes 250 times the memory."""

BATCH = 1000
"""Rows of a Parquet file that are read at a time."""


class ExampleRow(NamedTuple):
    """A row and where it stands, for messages."""

    where: str
    row: Mapping[str, Any]


class ExampleSource:
    """The rows of one domain, and its share of the training rows."""

    def __init__(
        self,
        *,
        weight: float,
        identity: Callable[[], Mapping[str, Any]],
        rows: Callable[[], Iterator[ExampleRow]],
    ) -> None:
        """`weight`: above 0, relative to the other sources'.

        `identity`: JSON-serialisable, quick to find, equal only where `rows` yields the same, in the same order.
        """
        if weight <= 0:
            raise ValueError(f"weight={weight} is not above 0 (leave the source out instead)")
        self.weight, self.identity, self.rows = weight, identity, rows


def example_files(path: str) -> ExampleSource:
    """A file, or the files of a folder and the folders in it: JSON lines, a JSON array or Parquet, the first two also
    compressed; on this machine or where fsspec reads (`s3://bucket/folder`, `hf://datasets/name`).

    Hidden files are passed over.

    Raises:
        ValueError: a path is missing or holds no such files, or a file cannot be read; the message says which row.
    """

    def files() -> list[File]:
        found = listed(path)
        if not found:
            raise ValueError(f"{path} holds no files")
        return found

    def identity() -> Mapping[str, Any]:
        return {
            "version": VERSION,
            "files": [(printable(file.path), file.size, file.stamp) for file in files()],
        }

    def rows() -> Iterator[ExampleRow]:
        for file in files():
            yield from read_rows(partial(opened, file.path), path=printable(file.path))

    return ExampleSource(weight=1.0, identity=identity, rows=rows)


def read_rows(open_file: Callable[[], IO[bytes]], *, path: str) -> Iterator[ExampleRow]:
    """The rows of one file.

    Raises:
        BadTextError: it is no JSON or Parquet, or a row of it is no object; says where.
    """
    with open_file() as file:
        try:
            for number, row in enumerate(_parsed(file, path), start=1):
                where = f"row {number} of {path}"
                if isinstance(row, BadTextError):
                    raise BadTextError(f"{where}: {row}")
                if row is TOO_LONG:
                    raise BadTextError(f"{where}: over {LONGEST:,} bytes")
                if not isinstance(row, Mapping):
                    raise BadTextError(f"{where}: must be a JSON object, not {type(row).__name__}")
                yield ExampleRow(where, row)
        except (UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile, pyarrow.ArrowException) as error:
            raise BadTextError(f"{path}: damaged, or no UTF-8 text ({' '.join(str(error).split())[:200]})") from error


def _parsed(file: IO[bytes], path: str) -> Iterator[Any]:
    plain = decompressed(file)
    head = plain.peek(CHUNK)[:CHUNK].removeprefix(b"\xef\xbb\xbf").lstrip()
    if head.startswith(b"PAR1"):
        file.seek(0)
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=BATCH):
            yield from batch.to_pylist()
    elif head.startswith(b"["):
        yield from elements(text_parts(plain), LONGEST)
    elif head.startswith(b"{"):
        for _, line in lines(plain, LONGEST):
            if line is None:
                yield TOO_LONG
            elif line.strip():
                yield _of_line(line)
    elif head:
        raise BadTextError(f"{path}: must be JSON lines, a JSON array or Parquet")


def _of_line(line: bytes) -> Any:
    try:
        return json.loads(line.removeprefix(b"\xef\xbb\xbf"))
    except (ValueError, RecursionError) as error:
        return BadTextError(f"no JSON ({error})")
