"""Fixtures that many tests share."""

from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def composed() -> Callable[..., DictConfig]:
    """compose(*overrides): the tiny model on synthetic data, unless the overrides say otherwise."""

    def build(*overrides: str) -> DictConfig:
        base = [f"hydra.searchpath=[file://{ROOT}/tests/conf]", "model=tiny", "data=synthetic", "tokenizer=bytes"]
        base.append("precision=bf16")
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return compose("train", overrides=[*base, "logger=none", "benchmarks=none", "run.tokens=5120", *overrides])

    return build
