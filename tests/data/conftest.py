"""Small corpora, a small tokenizer, and the shipped default data."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data.datamodule import DataModule
from data.documents import Document
from data.edition import slice_of
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
    """A source of given texts, named by their numbers. columns: of other fields of `Document`."""
    rows = [{"name": f"{label}{i}", "text": text} for i, text in enumerate(texts)]
    for name, values in columns.items():
        rows = [{**row, name: value} for row, value in zip(rows, values, strict=True)]
    return Source(
        weight=weight,
        identity=lambda: {"rows": rows},
        documents=lambda: iter([Document(**row) for row in rows]),
        size=lambda: sum(map(len, texts)),
    )


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ByteLevelBPE:
    """A BPE of 400 tokens."""
    texts = {"only": [words(seed=i, count=200) for i in range(40)]}
    folder = str(tmp_path_factory.mktemp("tokenizer"))
    return train_bpe(vocab_size=400, sample_characters=100_000, texts=texts, cache_dir=folder)


@pytest.fixture(scope="session")
def gpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer.json as GPT-2's, with none of DeepSeek's special tokens; id 0 ends a text."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet)
    made.train_from_iterator(["the quick brown fox jumps over the lazy dog"] * 3, trainer)
    path = tmp_path_factory.mktemp("gpt") / "tokenizer.json"
    made.save(str(path))
    return path


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


def training_texts(data: DataModule, domain: str) -> list[str]:
    """The training documents of a domain, read back from the store's token ids."""
    tokens = data.prepared.store.tokens(domain)
    return [
        data.tokenizer.decode(slice_of(tokens.shards, int(start), int(length)).tolist())
        for start, length in zip(tokens.starts, tokens.lengths)
    ]


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
            "packing": "cut",
            "isolate_documents": False,
            "held_out_fraction": 0.1,
            "held_out_bytes": 1_000_000,
            "max_document_bytes": 1_000_000,
            "processes": 1,
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
    """The data of conf/data/default.yaml, from the project's own cache."""
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


@pytest.fixture(params=["trained", "deepseek"], scope="module")
def any_tokenizer(request: pytest.FixtureRequest) -> ByteLevelBPE:
    name = {"trained": "tokenizer", "deepseek": "deepseek_tokenizer"}[request.param]
    result = request.getfixturevalue(name)
    assert isinstance(result, ByteLevelBPE)
    return result
