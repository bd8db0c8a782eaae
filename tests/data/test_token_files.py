"""Token files of Megatron-LM and nanoGPT give back the text that they were made of."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from data.token_files import token_files

END = 0
TEXTS = ["def f(x):\n    return x\n", "naïve 日本語 " * 40, "a"]


def texts_of(path: Path, gpt: Path, end: int | None = END) -> list[str]:
    source = token_files(path=str(path), tokenizer=str(gpt), end_of_text=end, weight=1.0)
    return ["".join(document.text) for document in source.documents()]  # type: ignore[union-attr]


def ids_of(gpt: Path) -> list[list[int]]:
    return [Tokenizer.from_file(str(gpt)).encode(text).ids for text in TEXTS]


@pytest.mark.parametrize("header", [b"", struct.pack("<256i", 20240520, *[0] * 255)])
def test_nanogpt_files_are_cut_at_the_end_of_each_text(gpt: Path, tmp_path: Path, header: bytes) -> None:
    ids = np.array([index for text in ids_of(gpt) for index in [*text, END]], np.uint16)
    (tmp_path / "train.bin").write_bytes(header + ids.tobytes())
    assert [text for text in texts_of(tmp_path, gpt) if text] == TEXTS
    assert texts_of(tmp_path / "train.bin", gpt, end=None) == ["".join(TEXTS)]


def write_megatron(folder: Path, documents: list[list[list[int]]], code: int, dtype: type) -> None:
    """Megatron-LM's files of documents that are lists of sequences."""
    sequences = [sequence for document in documents for sequence in document]
    sizes = np.array([len(sequence) for sequence in sequences], np.int32)
    offsets = np.concatenate([[0], np.cumsum(sizes)[:-1]]).astype(np.int64) * np.dtype(dtype).itemsize
    begins = np.concatenate([[0], np.cumsum([len(document) for document in documents])]).astype(np.int64)
    header = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(sizes), len(begins))
    (folder / "text.idx").write_bytes(header + sizes.tobytes() + offsets.tobytes() + begins.tobytes())
    (folder / "text.bin").write_bytes(np.concatenate([np.array(s, dtype) for s in sequences]).tobytes())


@pytest.mark.parametrize(("code", "dtype"), [(8, np.uint16), (4, np.int32)])
def test_megatron_documents_are_their_sequences_together(gpt: Path, tmp_path: Path, code: int, dtype: type) -> None:
    first, second, third = ids_of(gpt)
    write_megatron(tmp_path, [[first], [second[:50], second[50:]], [third]], code, dtype)
    assert texts_of(tmp_path, gpt) == TEXTS


def test_what_another_tokenizer_made_is_refused(gpt: Path, tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(np.array([1, 2, 60_000], np.uint16).tobytes())
    with pytest.raises(ValueError, match=r"document 0 of .*train.bin: token 60000, and the tokenizer has 2\d\d"):
        texts_of(tmp_path, gpt)
    letters = json.loads(gpt.read_text())["model"]["vocab"]
    (tmp_path / "train.bin").write_bytes(np.array([letters["Ã"]], np.uint16).tobytes())
    with pytest.raises(ValueError, match="no UTF-8 text; another tokenizer"):
        texts_of(tmp_path, gpt)


@pytest.mark.parametrize("cut", [5, 30, 60])
def test_a_cut_index_is_named(gpt: Path, tmp_path: Path, cut: int) -> None:
    write_megatron(tmp_path, [[ids] for ids in ids_of(gpt)], 8, np.uint16)
    (tmp_path / "text.idx").write_bytes((tmp_path / "text.idx").read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"text\.idx"):
        texts_of(tmp_path, gpt)


def test_identity_changes_with_the_files(gpt: Path, tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(b"\x01\x00")
    source = token_files(path=str(tmp_path), tokenizer=str(gpt), end_of_text=None, weight=1.0)
    before = source.identity()
    (tmp_path / "train.bin").write_bytes(b"\x01\x00\x02\x00")
    assert source.identity() != before
