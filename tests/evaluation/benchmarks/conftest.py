"""Models for the tests of benchmarks: a tiny one of ours, a tiny one of transformers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from transformers import LlamaConfig, LlamaForCausalLM

from data.tokenizer import train_bpe
from dsv3.build import build_model
from dsv3.evaluation.benchmarks.adapter import Adapter
from dsv3.evaluation.benchmarks.models import NativeModel
from dsv3.evaluation.benchmarks.suite import Suite
from dsv3.evaluation.benchmarks.tasks import RunTexts, TaskFinder
from dsv3.sandbox import Sandbox
from tests.conftest import ROOT
from tests.once import lm_eval_is_indexed_once
from tests.synthetic import ByteTokenizer

lm_eval_is_indexed_once()


@pytest.fixture
def own_model(composed: Callable[..., DictConfig]) -> NativeModel:
    """Weights large enough that its likelihoods differ from text to text."""
    decoder = build_model(composed("precision=fp32", "model.init_std=0.2")).eval()
    return NativeModel(decoder, ByteTokenizer(), name="tiny", max_length=256)


@pytest.fixture(scope="session")
def hugging_face_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaMA with a byte-level tokenizer that puts BOS first."""
    folder = tmp_path_factory.mktemp("llama")
    text = (ROOT / "dsv3" / "evaluation" / "benchmarks" / "adapter.py").read_text()
    tokenizer = train_bpe(vocab_size=400, sample_characters=20_000, texts={"code": [text]}, cache_dir=str(folder))
    tokenizer.save(str(folder))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, bos_token_id=tokenizer.bos,
        eos_token_id=tokenizer.eos, pad_token_id=tokenizer.pad,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


class Texts:
    """A stand-in for a run's data."""

    domains = ("code",)

    def held_out_documents(self, domain: str) -> list[str]:
        return [(ROOT / "dsv3" / name).read_text() for name in ("model/decoder.py", "build.py")]


def suite_of(model: Any, *folders: str, data: Any = None, batch_size: int = 4, seed: int = 1) -> Suite:
    finder = TaskFinder(["plugins/benchmarks", *folders], run=RunTexts(lambda: data), datasets_folder=None)
    return Suite(Adapter(model, batch_size=batch_size, seed=seed), finder, Sandbox(), seed=seed)
