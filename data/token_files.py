"""Token files of other trainers, decoded to text by the tokenizer that wrote them; then they are like any text."""

import codecs
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.documents import Document
from data.sources import VERSION, Source
from data.tokenizer import ByteLevelBPE, read
from dsv3.bounds import NonNegativeInt, PositiveFloat

MEGATRON = b"MMIDIDX\x00\x00"
DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
"""Megatron-LM's codes of the types that token ids may have."""

LLM_C = 20240520
"""First number of a header of 256 int32, which some files in nanoGPT's form have."""

BLOCK = 1 << 18
"""Tokens decoded at a time."""


def token_files(*, path: str, tokenizer: str, end_of_text: NonNegativeInt | None, weight: PositiveFloat) -> Source:
    """Megatron-LM's `.bin` with its `.idx` beside it, or nanoGPT's `.bin` (uint16); one file or a folder of them.

    tokenizer: the tokenizer.json (or its folder) of the byte-level BPE that made the ids. end_of_text: the id between
    documents of a nanoGPT file, such as GPT-2's 50256; null: each file is one document.

    Raises:
        ValueError: a file is damaged, or has ids that the tokenizer has not.
    """
    root = Path(path).expanduser()

    def files() -> list[Path]:
        found = sorted(root.rglob("*.bin")) if root.is_dir() else [root]
        if not found or not found[0].is_file():
            raise ValueError(f"path={path!r}: there is no .bin file")
        return found

    def identity() -> Mapping[str, Any]:
        used = [file for each in (*files(), *_tokenizer_files(tokenizer)) for file in (each, each.with_suffix(".idx"))]
        stats = [(str(file), file.stat()) for file in used if file.exists()]
        stamps = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        return {"version": VERSION, "end": end_of_text, "files": stamps}

    def documents() -> Iterator[Document]:
        decoder = read(tokenizer)
        for file in files():
            index = file.with_suffix(".idx")
            content = _megatron(file, index) if index.exists() else _nanogpt(file, end_of_text)
            name = file.relative_to(root).as_posix() if root.is_dir() else file.name
            for number, (start, stop) in enumerate(content.bounds):
                yield Document(
                    f"{name}:{number}", _text(content.ids[start:stop], decoder, f"document {number} of {file}")
                )

    return Source(
        weight=weight, identity=identity, documents=documents, size=lambda: sum(file.stat().st_size for file in files())
    )


class _Content(NamedTuple):
    ids: np.ndarray  # memory-mapped
    bounds: Iterable[tuple[int, int]]  # of each document


def _tokenizer_files(tokenizer: str) -> list[Path]:
    place = Path(tokenizer).expanduser()
    return [place / "tokenizer.json" if place.is_dir() else place]


def _megatron(file: Path, index: Path) -> _Content:
    """Megatron-LM's index: header, sizes and byte offsets of sequences, sequences at which documents begin."""
    data = index.read_bytes()
    if not data.startswith(MEGATRON):
        raise ValueError(f"{index}: no index of Megatron-LM")
    try:
        _, code, sequences, documents = struct.unpack_from("<QBQQ", data, len(MEGATRON))
        place = len(MEGATRON) + struct.calcsize("<QBQQ")
        sizes = np.frombuffer(data, np.int32, sequences, place)
        begins = np.frombuffer(data, np.int64, documents, place + 12 * sequences)
        ids = np.memmap(file, DTYPES[code], "r")
    except (struct.error, ValueError, KeyError) as error:
        raise ValueError(f"{index}: damaged, or of an unknown kind ({error!r})") from error
    ends = np.concatenate([[0], np.cumsum(sizes.astype(np.int64))])[begins]
    if len(ends) and ends[-1] > len(ids):
        raise ValueError(f"{file}: it has {len(ids):,} tokens, and its index names {ends[-1]:,}")
    return _Content(ids, zip(ends[:-1].tolist(), ends[1:].tolist()))


def _nanogpt(file: Path, end_of_text: int | None) -> _Content:
    if file.stat().st_size < 2 or file.stat().st_size % 2:
        raise ValueError(f"{file}: no token file (its size is no multiple of two bytes)")
    ids: np.ndarray = np.memmap(file, np.uint16, "r")
    if len(ids) >= 512 and int(ids[:2].view(np.int32)[0]) == LLM_C:
        ids = ids[512:]
    return _Content(ids, _between(ids, end_of_text))


def _between(ids: np.ndarray, end: int | None) -> Iterator[tuple[int, int]]:
    """The stretches between the tokens `end`."""
    start = 0
    for block in range(0, len(ids), BLOCK) if end is not None else ():
        for place in np.flatnonzero(ids[block : block + BLOCK] == end).tolist():
            yield start, block + place
            start = block + place + 1
    yield start, len(ids)


def _text(ids: np.ndarray, tokenizer: ByteLevelBPE, where: str) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        for start in range(0, len(ids), BLOCK):
            block = ids[start : start + BLOCK]
            if int(block.max()) >= tokenizer.vocab_size or int(block.min()) < 0:
                raise ValueError(f"{where}: token {block.max()}, and the tokenizer has {tokenizer.vocab_size}")
            yield decoder.decode(tokenizer.decode_bytes(block.tolist()))
        yield decoder.decode(b"", final=True)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: its tokens are no UTF-8 text; another tokenizer made them") from error
