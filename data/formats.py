"""Documents of one file, whose format is found by looking at its content.

Text, JSON lines, a JSON array, CSV, Parquet and Arrow, each also compressed (gzip, zstd, bz2, xz), from any file system
that fsspec knows. A file gives rows if the column that was asked for is in its first row. Where its name promises
rows (.jsonl, .csv, .parquet, ...) and the column is not there, it is refused; any other file is one text.
"""

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

import pyarrow
import pyarrow.compute
import pyarrow.ipc
import pyarrow.parquet

from data.documents import BadTextError, Document, LeftOut
from data.json_rows import CHUNK, TOO_LONG, elements, first_element, first_object, lines

COMPRESSED: dict[bytes, Callable[[Any], Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.BZ2File,
    b"\xfd7zXZ\x00": lzma.LZMAFile,
    b"\x28\xb5\x2f\xfd": lambda file: pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd"),
}
"""First bytes -> what reads the content."""

ROWS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")
"""Endings of names that promise rows."""

HEAD = 1 << 16
FIRST_ROW = 1 << 24  # of which the column is looked for where it is not in the head
FIELD = 1 << 28  # characters, beyond the longest row, from which on a CSV field is taken for a lost quote
ESCAPED = re.compile("[\udc80-\udcff]")  # bytes that are not UTF-8
BINARY = "binary"


def read(open_file: Callable[[], IO[bytes]], *, name: str, path: str, column: str, longest: int) -> Iterator[Any]:
    """The documents of a file, named `name` or, row by row, `name:row`; and what of it is left out.

    open_file: opens it anew, for reading bytes, with `seek`. path: for messages. column: of rows, the text. longest:
    bytes of the longest row that is taken. What cannot be read raises BadTextError or, where the rest of the file can
    be, is yielded as one.
    """
    try:
        with open_file() as file:
            yield from _read(file, open_file, name=name, path=path, column=column, longest=longest)
    except UnicodeDecodeError as error:
        raise BadTextError(f"{path}: {_no_utf8(error)}") from error
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, pyarrow.ArrowException, csv.Error) as error:
        raise BadTextError(f"{path}: damaged ({' '.join(str(error).split())[:200]})") from error
    except OSError as error:
        if error.errno is not None:
            raise
        raise BadTextError(f"{path}: damaged ({error})") from error  # what bz2 and pyarrow's streams raise


def _read(
    file: IO[bytes], open_file: Callable[[], IO[bytes]], *, name: str, path: str, column: str, longest: int
) -> Iterator[Any]:
    plain, again = decompressed(file), lambda: decompressed(open_file())
    head = plain.peek(HEAD)[:HEAD]
    promised = name.lower().removesuffix(".gz").removesuffix(".zst").removesuffix(".bz2").removesuffix(".xz")
    rows = _Rows(name, path, column, longest, required=promised.endswith(ROWS))
    if head.startswith(b"PAR1"):
        yield from rows.of_batches(_parquet(_seekable(file, plain), path, column))
    elif head.startswith((b"ARROW1\x00\x00", b"\xff\xff\xff\xff")):
        yield from rows.of_batches(_arrow(_seekable(file, plain), path, column, head))
    elif head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and b"\x00" in head:
        raise BadTextError(f"{path}: UTF-16; convert it to UTF-8")
    elif b"\x00" in head:
        yield LeftOut(name, BINARY)
    elif (of_rows := rows.of_text(head, plain, again)) is not None:
        yield from of_rows
    else:
        _check_utf8(plain, path)
        with again() as text:
            yield Document(name, text_parts(text))


def _no_utf8(error: UnicodeDecodeError) -> str:
    return f"no UTF-8 text (byte 0x{error.object[error.start]:02x}: {error.reason})"


def decompressed(file: IO[bytes]) -> Any:
    """A buffered reader of the content, which `peek` looks at."""
    head = file.read(8)
    file.seek(0)
    for magic, opened in COMPRESSED.items():
        if head.startswith(magic):
            return io.BufferedReader(_Raw(opened(file)), CHUNK)
    return io.BufferedReader(_Raw(file), CHUNK)


class _Raw(io.RawIOBase):
    """What io.BufferedReader needs of a file-like object that only has `read`."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        filled = 0  # a short read, such as between the frames of zstd, is not the end
        while filled < len(buffer) and (data := self.file.read(len(buffer) - filled)):
            buffer[filled : filled + len(data)] = data
            filled += len(data)
        return filled

    def close(self) -> None:
        if not self.closed:
            self.file.close()
        super().close()


def _seekable(file: IO[bytes], plain: Any) -> IO[bytes]:
    """For formats that are read from several places; a compressed one is read into memory as a whole."""
    if plain.raw.file is not file:
        return io.BytesIO(plain.read())
    file.seek(0)
    return file


def text_parts(file: Any) -> Iterator[str]:
    """A text in parts, without a byte order mark."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    while data := file.read(CHUNK):
        yield decoder.decode(data)
    yield decoder.decode(b"", final=True)


def _check_utf8(file: Any, path: str) -> None:
    """Raise unless the whole file is UTF-8 without NUL: nothing of it is taken before."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    line = 1
    while True:
        data = file.read(CHUNK)
        try:
            text = decoder.decode(data, final=not data)
        except UnicodeDecodeError as error:
            line += error.object.count(b"\n", 0, error.start)
            raise BadTextError(f"line {line} of {path}: {_no_utf8(error)}") from error
        if b"\x00" in data:
            raise BadTextError(f"line {line + data.count(10, 0, data.index(0))} of {path}: a NUL byte")
        if not data:
            return
        line += text.count("\n")


class _Rows:
    """Rows as documents: their text is in `column`."""

    def __init__(self, name: str, path: str, column: str, longest: int, *, required: bool) -> None:
        self.name, self.path, self.column, self.longest, self.required = name, path, column, longest, required

    def of_batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        number = 0
        for texts in batches:
            sizes = pyarrow.compute.binary_length(texts).to_pylist()
            for i, size in enumerate(sizes):
                number += 1
                where = f"row {number} of {self.path}"
                if size is not None and size > self.longest:
                    yield self._too_long(number)
                    continue
                try:
                    yield self._row(texts[i].as_py(), number, where)
                except UnicodeDecodeError as error:
                    yield BadTextError(f"{where}: {_no_utf8(error)}")

    def of_text(self, head: bytes, file: Any, again: Callable[[], Any]) -> Iterator[Any] | None:
        """Rows of JSON lines, a JSON array or CSV; None where the file is none of them."""
        start = head.removeprefix(codecs.BOM_UTF8)
        if not start.strip():
            return None
        first = start.lstrip().partition(b"\n")[0]
        bom = len(head) - len(start)
        if start.lstrip().startswith(b"{"):
            row = first_object(first)
            if self._lacks(row) and len(head) == HEAD and b"\n" not in start.lstrip():
                with again() as longer:
                    row = first_object(longer.read(FIRST_ROW)[bom:].lstrip().partition(b"\n")[0])
            return self._wanted(row, lambda: self._json_lines(file, bom))
        if start.lstrip().startswith(b"["):
            row = first_element(start.decode("utf-8", "replace"))
            if self._lacks(row) and len(head) == HEAD:
                with again() as longer:
                    row = first_element(longer.read(FIRST_ROW)[bom:].decode("utf-8", "replace"))
            return self._wanted(row, lambda: self._json_array(file))
        return self._csv(start.lstrip(b"\r\n").partition(b"\n")[0], file)

    def _lacks(self, row: Any) -> bool:
        return isinstance(row, dict) and self.column not in row

    def _wanted(self, first: Any, rows: Callable[[], Iterator[Any]]) -> Iterator[Any] | None:
        if isinstance(first, dict) and self.column in first:
            return rows()
        if self.required:
            found = sorted(first) if isinstance(first, dict) else "no row"
            raise BadTextError(f"text_column={self.column!r} is not in the first row of {self.path}: {found}")
        return None

    def _json_lines(self, file: Any, bom: int) -> Iterator[Any]:
        file.read(bom)
        for number, line in lines(file, self.longest):
            where = f"line {number} of {self.path}"
            if line is None:
                yield self._too_long(number)
            elif line.strip():
                yield self._of_json(line, number, where)

    def _of_json(self, line: bytes, number: int, where: str) -> Any:
        try:
            row = json.loads(line)
        except UnicodeDecodeError as error:
            return BadTextError(f"{where}: {_no_utf8(error)}")
        except (ValueError, RecursionError) as error:
            return BadTextError(f"{where}: no JSON ({error})")
        return self._of_object(row, number, where)

    def _of_object(self, row: Any, number: int, where: str) -> Any:
        if not isinstance(row, dict) or self.column not in row:
            found = sorted(row) if isinstance(row, dict) else type(row).__name__
            return BadTextError(f"text_column={self.column!r} is not in {where}: {found}")
        return self._row(row[self.column], number, where)

    def _json_array(self, file: Any) -> Iterator[Any]:
        number = 0
        for number, row in enumerate(self._decoded(elements(text_parts(file), self.longest)), start=1):
            if row is TOO_LONG:
                yield LeftOut(f"{self.name}:{number - 1}", "too long", f"from a row of over {self.longest:,} bytes on")
                return
            where = f"row {number} of {self.path}"
            yield row if isinstance(row, BadTextError) else self._of_object(row, number, where)
            if isinstance(row, BadTextError):
                raise BadTextError(f"{where}: {row}")

    def _decoded(self, elements: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from elements
        except UnicodeDecodeError as error:
            yield BadTextError(f"{_no_utf8(error)}, in this row or a later one")

    def _csv(self, first: bytes, file: Any) -> Iterator[Any] | None:
        header = first.decode("utf-8", "replace").strip("\r")
        for delimiter in (",", "\t", ";"):
            columns = next(csv.reader([header], delimiter=delimiter), [])
            if self.column in columns and (len(columns) > 1 or self.required):
                return self._csv_rows(file, delimiter)
        if self.required:
            raise BadTextError(f"text_column={self.column!r} is not in the first line of {self.path}: {header[:200]}")
        return None

    def _csv_rows(self, file: Any, delimiter: str) -> Iterator[Any]:
        csv.field_size_limit(2 * self.longest + FIELD)
        lines = io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="")
        rows = csv.reader(lines, delimiter=delimiter)
        columns = next(row for row in rows if row)
        place = columns.index(self.column)
        number = 0
        while True:
            number += 1
            where = f"row {number} of {self.path}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                raise BadTextError(f"{where}: {error}") from error
            if not row:
                continue
            if len(row) <= place:
                yield BadTextError(f"{where}: it has {len(row)} columns, and the header {len(columns)}")
            elif len(row[place].encode("utf-8", "surrogatepass")) > self.longest:
                yield self._too_long(number)
            elif ESCAPED.search(row[place]):
                yield BadTextError(f"{where}: no UTF-8 text")
            else:
                yield self._row(row[place], number, where)

    def _row(self, text: Any, number: int, where: str) -> Any:
        if text is None:
            text = ""
        if not isinstance(text, str):
            return BadTextError(f"text_column={self.column!r} in {where} is not text: {str(text)[:80]}")
        try:
            size = len(text) if text.isascii() else len(text.encode())
        except UnicodeEncodeError:
            return BadTextError(f"{where}: a lone surrogate, which is no text")
        return self._too_long(number) if size > self.longest else Document(f"{self.name}:{number - 1}", text)

    def _too_long(self, number: int) -> LeftOut:
        return LeftOut(f"{self.name}:{number - 1}", "too long", f"a row of over {self.longest:,} bytes")


def _column(schema: Any, path: str, column: str) -> None:
    if column not in schema.names:
        raise BadTextError(f"text_column={column!r} is not among the columns of {path}: {schema.names}")
    kind = schema.field(column).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
        raise BadTextError(f"text_column={column!r} in {path} is not text: its type is {kind}")


def _parquet(file: IO[bytes], path: str, column: str) -> Iterator[Any]:
    table = pyarrow.parquet.ParquetFile(file, buffer_size=CHUNK, pre_buffer=False)
    _column(table.schema_arrow, path, column)
    for group in range(table.num_row_groups):
        of_group = table.metadata.row_group(group)
        leaves = (of_group.column(i) for i in range(of_group.num_columns))  # a nested column has several
        size = sum(leaf.total_uncompressed_size for leaf in leaves if leaf.path_in_schema == column)
        size /= max(1, of_group.num_rows)
        rows = max(1, min(10_000, int(4 * CHUNK / max(1, size))))
        for batch in table.iter_batches(batch_size=rows, row_groups=[group], columns=[column], use_threads=False):
            yield _plain(batch.column(0))


def _arrow(file: IO[bytes], path: str, column: str, head: bytes) -> Iterator[Any]:
    opened = pyarrow.ipc.open_file(file) if head.startswith(b"ARROW1") else pyarrow.ipc.open_stream(file)
    _column(opened.schema, path, column)
    place = opened.schema.names.index(column)
    batches = (
        (opened.get_batch(i) for i in range(opened.num_record_batches)) if head.startswith(b"ARROW1") else iter(opened)
    )
    for batch in batches:
        yield _plain(batch.column(place))


def _plain(texts: Any) -> Any:
    return texts.dictionary_decode() if pyarrow.types.is_dictionary(texts.type) else texts
