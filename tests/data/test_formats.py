"""Formats: what a file gives is found by its content, and what cannot be read is named."""

import bz2
import csv
import gzip
import io
import json
import lzma
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.documents import BadTextError, Document, LeftOut
from data.formats import read
from data.sources import LONGEST

TEXTS = ["one", 'two\nlines, "quoted"; naïve 🙂', "", "three\ttabs\r\n"]


def found(content: bytes, *, name: str = "a", column: str = "text", longest: int = LONGEST) -> list[Any]:
    result = []
    for each in read(lambda: io.BytesIO(content), name=name, path=name, column=column, longest=longest):
        whole = isinstance(each, Document) and not isinstance(each.text, str)
        result.append(each._replace(text="".join(each.text)) if whole else each)
    return result


def texts(content: bytes, **settings: Any) -> list[str]:
    documents = found(content, **settings)
    assert all(isinstance(document, Document) for document in documents), documents
    return [document.text for document in documents]


def json_lines(rows: list[str]) -> bytes:
    return b"".join(json.dumps({"n": 1, "text": text}).encode() + b"\n" for text in rows)


def json_array(rows: list[str]) -> bytes:
    return json.dumps([{"more": {"text": ["x"]}, "text": text} for text in rows], ensure_ascii=False).encode()


def delimited(delimiter: str) -> Callable[[list[str]], bytes]:
    def written(rows: list[str]) -> bytes:
        file = io.StringIO()
        csv.writer(file, delimiter=delimiter).writerows([["n", "text"], *([str(i), row] for i, row in enumerate(rows))])
        return file.getvalue().encode()

    return written


def table(rows: list[str | None]) -> Any:
    nested = [{"a": "x", "b": "y"}] * len(rows)
    return pyarrow.table({"more": nested, "text": pyarrow.array(rows, pyarrow.string())})


def parquet(rows: list[str | None]) -> bytes:
    file = io.BytesIO()
    pyarrow.parquet.write_table(table(rows), file, row_group_size=2)
    return file.getvalue()


def arrow(make: Callable[..., Any]) -> Callable[[list[str]], bytes]:
    def written(rows: list[str]) -> bytes:
        file = io.BytesIO()
        with make(file, table(rows).schema) as writer:
            writer.write_table(table(rows))
        return file.getvalue()

    return written


def zstd(content: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as file:
        file.write(content)
    return sink.getvalue().to_pybytes()


def zstd_frames(content: bytes) -> bytes:
    return zstd(content[:3]) + zstd(b"") + zstd(content[3:9]) + zstd(content[9:])


WRITTEN: dict[str, Callable[[list[str]], bytes]] = {
    "json lines": json_lines,
    "json array": json_array,
    "csv": delimited(","),
    "tsv": delimited("\t"),
    "semicolons": delimited(";"),
    "parquet": parquet,
    "arrow file": arrow(pyarrow.ipc.new_file),
    "arrow stream": arrow(pyarrow.ipc.new_stream),
}
COMPRESSED: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gzip": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zstd": zstd,
    "zstd in frames": zstd_frames,
}


@pytest.mark.parametrize("compression", COMPRESSED)
@pytest.mark.parametrize("form", WRITTEN)
def test_rows_are_found_by_content_whatever_the_name(form: str, compression: str) -> None:
    content = COMPRESSED[compression](WRITTEN[form](TEXTS))
    documents = found(content, name="part.json")
    assert [document.text for document in documents] == TEXTS
    assert [document.name for document in documents] == [f"part.json:{i}" for i in range(len(TEXTS))]


@pytest.mark.parametrize("compression", COMPRESSED)
def test_text_is_one_document(compression: str) -> None:
    text = "naïve, text\r\n" * 100_000
    assert found(COMPRESSED[compression](text.encode())) == [Document("a", text)]


@given(
    st.sampled_from(sorted(WRITTEN)),
    st.sampled_from(sorted(COMPRESSED)),
    st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=1, max_size=5),
)
def test_documents_come_back_equal_and_in_order(form: str, compression: str, rows: list[str]) -> None:
    assert texts(COMPRESSED[compression](WRITTEN[form](rows))) == rows


@pytest.mark.parametrize("compression", COMPRESSED)
def test_large_parquet_is_read_from_any_compression(compression: str) -> None:
    rows = [f"{i} {i * 7919 % 104729:x}" * 20 for i in range(20_000)]
    file = io.BytesIO()
    pyarrow.parquet.write_table(table(rows), file, compression="none", use_dictionary=False)
    assert texts(COMPRESSED[compression](file.getvalue())) == rows


@pytest.mark.parametrize("form", ["json lines", "json array", "csv"])
def test_byte_order_mark_and_crlf_are_no_text(form: str) -> None:
    content = WRITTEN[form](["one", "two"]).replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    assert texts(b"\xef\xbb\xbf" + content) == ["one", "two"]


def test_byte_order_mark_of_a_text_is_dropped() -> None:
    assert texts(b"\xef\xbb\xbfone") == ["one"]


def test_json_array_is_read_in_parts() -> None:
    rows = [f'{i} [nested] {{x}} \\ "é" ' * 9 for i in range(30_000)]
    content = json_array(rows)
    assert len(content) > 3_000_000
    assert texts(content) == rows


@pytest.mark.parametrize("form", ["json lines", "json array"])
def test_a_row_longer_than_a_read_is_read(form: str) -> None:
    rows = ["é[" * 1_200_000, "short", "x" * 3_000_000]
    assert texts(WRITTEN[form](rows)) == rows


@pytest.mark.parametrize("size", [70_000, 1_200_000])
@pytest.mark.parametrize("column_is_first", [True, False])
@pytest.mark.parametrize("as_array", [True, False])
def test_a_long_first_row_is_a_row(size: int, column_is_first: bool, as_array: bool) -> None:
    row = {"text": "x" * size, "n": 1} if column_is_first else {"n": "y" * size, "text": "x"}
    content = json.dumps([row, row] if as_array else row) + ("" if as_array else f"\n{json.dumps(row)}\n")
    assert texts(content.encode()) == [row["text"]] * 2


def test_a_long_first_row_of_csv_is_a_row() -> None:
    assert texts(delimited(",")(["x" * 1_200_000, "y"])) == ["x" * 1_200_000, "y"]


def test_blank_lines_before_a_csv_header_are_passed_over() -> None:
    assert texts(b"\r\n\nn,text\n1,one\n") == ["one"]


def test_null_is_an_empty_document() -> None:
    assert texts(parquet(["one", None, "two"])) == ["one", "", "two"]


def test_json_that_is_no_rows_is_text() -> None:
    for content in ('{"a": 1}', "[1, 2]", '{\n  "text": 1\n}', "{broken", "[", "[]"):
        assert found(content.encode(), name="settings.json") == [Document("settings.json", content)]


def test_an_empty_file_is_an_empty_document() -> None:
    for name in ("a.txt", "a.jsonl", "a.csv"):
        assert found(b"", name=name) == [Document(name, "")]


@pytest.mark.parametrize("form", WRITTEN)
def test_a_row_beyond_the_longest_is_left_out_and_the_rest_is_read(form: str) -> None:
    rows = found(WRITTEN[form](["one", "é" * 4_000_000, "two"]), longest=1000)
    assert [row.text for row in rows if isinstance(row, Document)] == ["one", "two"]
    assert [row.reason for row in rows if isinstance(row, LeftOut)] == ["too long"]


def test_a_binary_file_is_left_out() -> None:
    assert found(b"\x7fELF\x00\x01") == [LeftOut("a", "binary")]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"one\ntwo\nna\xefve\n", "line 3 of a.txt: no UTF-8 text"),
        ("a.txt", b"x\n" * 600_000 + b"\xef", "line 600001 of a.txt: no UTF-8 text"),
        ("a.txt", b"x\n" * 600_000 + b"\0", "line 600001 of a.txt: a NUL byte"),
        ("a.txt", "text".encode("utf-16"), "a.txt: UTF-16; convert it"),
        (
            "a.json",
            b'[{"text": "a"}, {"text": "na\xefve"}]',
            "row 1 of a.json: no UTF-8 text .*, in this row or a later one",
        ),
        ("a.json", b'[{"text": "a"}, {"text": ', "row 2 of a.json: no JSON"),
        ("a.json", b'[{"text": "a"},', "row 2 of a.json: the array has no end"),
        ("a.json", b'[{"text": "a"}, {"text": tru}, ' + b" " * 3_000_000, "row 2 of a.json: no JSON"),
        ("a.jsonl", b'{"body": "a"}', r"text_column='text' is not in the first row of a.jsonl: \['body'\]"),
        ("a.csv.gz", gzip.compress(b"n,body\n"), "text_column='text' is not in the first line of a.csv.gz: n,body"),
        (
            "a.parquet",
            parquet(["one"]),
            r"text_column='none' is not among the columns of a.parquet: \['more', 'text'\]",
        ),
        ("a.parquet", parquet(["one"]), "text_column='more' in a.parquet is not text: its type is struct"),
        ("a.parquet", parquet(["one"])[:-20], "a.parquet: damaged"),
        ("a.gz", gzip.compress(b"text" * 100)[:-12], "a.gz: damaged"),
        ("a.gz", gzip.compress(b"text")[:10] + b"\xff" * 20, "a.gz: damaged"),
        ("a.zst", zstd(bytes(range(1, 128)) * 99)[:-12], "a.zst: damaged"),
        ("a.bz2", bz2.compress(b"text")[:-5], "a.bz2: damaged"),
        ("a.xz", lzma.compress(b"text")[:-5], "a.xz: damaged"),
    ],
    ids=lambda value: "content" if isinstance(value, bytes) else None,
)
def test_a_file_that_cannot_be_read_is_named(name: str, content: bytes, message: str) -> None:
    column = message.split("'")[1] if message.startswith("text_column") else "text"
    with pytest.raises(BadTextError, match=message):
        found(content, name=name, column=column)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": "\\ud800"}\n{"text": "b"}', "line 2 of a: a lone surrogate"),
        (b'{"text": "a"}\n{"text": "na\xefve"}\n{"text": "b"}', "line 2 of a: no UTF-8 text"),
        (b'{"text": "a"}\n{broken\n{"text": "b"}', "line 2 of a: no JSON"),
        (b'{"text": "a"}\n{"text": 3}\n{"text": "b"}', "text_column='text' in line 2 of a is not text: 3"),
        (b'{"text": "a"}\n{"body": 3}\n{"text": "b"}', "text_column='text' is not in line 2 of a: ['body']"),
        (b'[{"text": "a"}, 3, {"text": "b"}]', "text_column='text' is not in row 2 of a: int"),
        (b"n,text\n1,a\n2,na\xefve\n3,b\n", "row 2 of a: no UTF-8 text"),
        (b"n,text\n1,a\n2\n3,b\n", "row 2 of a: it has 1 columns, and the header 2"),
    ],
)
def test_a_bad_row_is_named_and_the_rest_is_read(content: bytes, message: str) -> None:
    first, bad, last = found(content)
    assert (first.text, last.text) == ("a", "b")
    assert isinstance(bad, BadTextError)
    assert str(bad).startswith(message)


def test_a_text_is_read_in_bounded_memory(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b"some words of a line\n" * 1_500_000)
    tracemalloc.start()
    try:
        size = 0
        for document in read(lambda: file.open("rb"), name="a", path="a", column="text", longest=LONGEST):
            size += sum(map(len, document.text))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size == 31_500_000
    assert peak < 8_000_000
