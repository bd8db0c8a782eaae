"""Small corpora, a small tokenizer, and the shipped default data."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from hydra.utils import instantiate
from omegaconf import OmegaConf

from data.datamodule import DataModule
from data.sources import Source
from data.tokenizer import ByteLevelBPE, deepseek, train_bpe

ROOT = Path(__file__).resolve().parents[2]

WORDS = "for x in range ( 10 ) : print ( x ) def naïve value 日本語 the quick brown fox jumps. over, 2024".split()  # noqa: SIM905


def words(*, seed: int, count: int) -> str:
    """Random lines of code-like words."""
    source = random.Random(seed)
    parts = [source.choice(WORDS) + source.choice([" ", " ", ".\n", "\n    ", ":\n", "\n\n"]) for _ in range(count)]
    return f"document {seed}\n" + "".join(parts)


def in_memory(texts: list[str], *, weight: float = 1.0, label: str = "", **columns: list[Any]) -> Source:
    """A source of given texts, named by their numbers."""
    rows = {"name": [f"{label}{i}" for i in range(len(texts))], "text": texts, **columns}
    return Source(weight=weight, identity=lambda: {"rows": rows}, load=lambda: Dataset.from_dict(rows))


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ByteLevelBPE:
    """A BPE of 400 tokens."""
    texts = {"only": [words(seed=i, count=200) for i in range(40)]}
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    return train_bpe(vocab_size=400, sample_characters=100_000, texts=texts, cache_dir=folder)


@pytest.fixture(scope="session")
def deepseek_tokenizer() -> ByteLevelBPE:
    return deepseek(vocab_size=129280, texts={}, cache_dir="")


@pytest.fixture(scope="session")
def sources() -> dict[str, Source]:
    """Three domains whose documents differ in length by a factor of a hundred."""
    return {
        "long": in_memory([words(seed=i, count=3000) for i in range(12)], weight=0.5, label="long"),
        "middle": in_memory([words(seed=100 + i, count=200) for i in range(60)], weight=0.3, label="middle"),
        "short": in_memory([words(seed=1000 + i, count=25) for i in range(400)], weight=0.2, label="short"),
    }


Make = Callable[..., DataModule]


@pytest.fixture(scope="session")
def make(tokenizer: ByteLevelBPE, sources: dict[str, Source], tmp_path_factory: pytest.TempPathFactory) -> Make:
    """make(**changes): a datamodule of the small corpora."""
    folder = tmp_path_factory.mktemp("cache")

    def build(**changes: Any) -> DataModule:
        settings: dict[str, Any] = {
            "tokenizer": lambda **_: tokenizer,
            "seed": 1,
            "cache_dir": folder,
            "sequence_length": 64,
            "total_tokens": 64 * 4 * 30,
            "micro_batch_size": 4,
            "global_batch_size": lambda tokens: 4,
            "shuffle_window": 16,
            "isolate_documents": False,
            "held_out_fraction": 0.1,
            "validation_tokens": 1000,
            "questions": 0,
            "fim": {"rate": 0.1, "order": "psm", "max_characters": 200},
            "split_punctuation_newline": 0.2,
            "sources": sources,
        }
        return DataModule(**{**settings, **changes})

    return build


@pytest.fixture(scope="session")
def default_data() -> DataModule:
    """What conf/data/default.yaml gives, from the project's own cache."""
    config = OmegaConf.create(
        {
            "seed": 1,
            "run": {"tokens": 300_000},
            "data": OmegaConf.load(ROOT / "conf/data/default.yaml"),
            "tokenizer": OmegaConf.load(ROOT / "conf/tokenizer/bpe.yaml"),
        }
    )
    del config.data.global_batch_size  # the schedule has tests of its own
    tokenizer = instantiate(config.tokenizer, _convert_="all")
    make = instantiate(config.data, _convert_="all")
    data = make(tokenizer=tokenizer, global_batch_size=lambda tokens: 8, cache_dir=ROOT / config.data.cache_dir)
    data.setup()
    return data
