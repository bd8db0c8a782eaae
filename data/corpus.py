"""Corpus: training and held-out texts of every domain, and the training texts as token ids; cached."""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
from datasets import Dataset, load_from_disk

from data.cache import cached, digest, number
from data.sources import Source
from data.split import Document, split
from data.tokenizer import ByteLevelBPE

CODE = digest((Path(__file__).parent / "split.py").read_text(encoding="utf-8"))

BATCH_CHARACTERS = 1_000_000
"""Texts tokenised at a time: enough for all cores, little beside the texts themselves."""


class Corpus(NamedTuple):
    """Memory-mapped texts; the rows of each dataset are `Document`s in a fixed random order."""

    key: str  # equal for equal texts in an equal split
    train: dict[str, Dataset]
    held_out: dict[str, Dataset]


class DomainTokens(NamedTuple):
    """The training documents of a domain, each as `<bos> text <eos>`."""

    tokens: np.ndarray  # uint16 or uint32, all documents end to end, memory-mapped
    offsets: np.ndarray  # int64 [documents + 1]
    numbers: np.ndarray  # uint64 [documents], from the document's name alone
    texts: Dataset

    def document(self, index: int) -> np.ndarray:
        return self.tokens[self.offsets[index] : self.offsets[index + 1]]


def read_corpus(*, sources: Mapping[str, Source], held_out_fraction: float, cache_dir: Path) -> Corpus:
    """Read, split and cache the texts of all sources; or find them in the cache.

    Raises:
        ValueError: a source is at fault (its key is named), or leaves a domain without training or held-out texts.
    """
    if not 0 < held_out_fraction < 1:
        raise ValueError(f"data.held_out_fraction={held_out_fraction}: must be between 0 and 1")
    for name in sources:
        if not re.fullmatch(r"\w+", name):
            raise ValueError(f"data.sources.{name}: a domain's name is made of letters, digits and underscores")
    key = digest(
        [CODE, held_out_fraction, {name: _of_source(name, source.identity) for name, source in sources.items()}]
    )

    def build(folder: Path) -> None:
        documents = [document for name, source in sources.items() for document in _documents(name, source)]
        _save(split(documents, share=held_out_fraction), list(sources), folder)

    folder = cached(cache_dir / "texts", key, "the texts of " + ", ".join(sources), build)
    parts = [{name: load_from_disk(str(folder / name / part)) for name in sources} for part in ("train", "held_out")]
    return Corpus(key, *parts)


def tokenise(*, corpus: Corpus, tokenizer: ByteLevelBPE, cache_dir: Path) -> dict[str, DomainTokens]:
    """Token ids of every training document; or find them in the cache."""
    key = digest([corpus.key, tokenizer.identity()])
    domains = {}

    def build(folder: Path) -> None:
        for name, texts in corpus.train.items():
            tokens, lengths = _encode(texts["text"], tokenizer)
            np.save(folder / f"{name}.tokens.npy", tokens)
            np.save(folder / f"{name}.offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
            numbers = [number(f"{name}/{document}") for document in texts["name"]]
            np.save(folder / f"{name}.numbers.npy", np.array(numbers, dtype=np.uint64))

    folder = cached(cache_dir / "tokens", key, "the token ids", build)
    for name, texts in corpus.train.items():
        tokens, offsets, numbers = (
            np.load(folder / f"{name}.{part}.npy", mmap_mode="r") for part in ("tokens", "offsets", "numbers")
        )
        domains[name] = DomainTokens(tokens, offsets, numbers, texts)
    return domains


def _of_source(name: str, part: Callable[[], Any]) -> Any:
    """Call a part of a source, and name its key in what goes wrong."""
    try:
        return part()
    except ValueError as error:
        raise ValueError(f"data.sources.{name}: {error}") from error


def _documents(name: str, source: Source) -> list[Document]:
    rows = _of_source(name, source.load)
    return [Document(domain=name, **row) for row in rows]


def _save(documents: Sequence[Document], names: Sequence[str], folder: Path) -> None:
    for name in names:
        for part in ("train", "held_out"):
            chosen = [d for d in documents if d.domain == name and d.held_out == (part == "held_out")]
            if not chosen:
                raise ValueError(
                    f"data.sources.{name} gives no {part.replace('_', '-')} documents: a domain needs at least two "
                    "different ones, and one held out that does not mostly repeat another"
                )
            dataset = Dataset.from_list([document._asdict() for document in chosen])
            datasets.disable_progress_bars()
            dataset.save_to_disk(str(folder / name / part))
            datasets.enable_progress_bars()


def _encode(texts: Sequence[str], tokenizer: ByteLevelBPE) -> tuple[np.ndarray, list[int]]:
    """All texts end to end, each from BOS to EOS, and their lengths in tokens."""
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    chunks: list[np.ndarray] = []
    lengths: list[int] = []
    batch: list[str] = []
    characters = 0
    for i, text in enumerate(texts, start=1):
        batch.append(text)
        characters += len(text)
        if characters >= BATCH_CHARACTERS or i == len(texts):
            for ids in tokenizer.encode_batch(batch):
                chunks.append(np.array([tokenizer.bos, *ids, tokenizer.eos], dtype=dtype))
                lengths.append(len(ids) + 2)
            batch, characters = [], 0
    return np.concatenate(chunks), lengths
