"""Every option of every kind of plugin trains through its one key; every combination of the main kinds builds."""

import copy
import itertools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

import dsv3.training.run
from dsv3.build import build_data, build_model
from dsv3.checkpoint.run_folder import RunFolder
from dsv3.contracts import MicroBatch
from dsv3.training.run import build_run
from dsv3.training.settle import settled
from tests.conftest import ROOT

KINDS = (
    "attention",
    "router",
    "balancing",
    "experts",
    "dispatch",
    "memory",
    "mtp",
    "precision",
    "optimizer",
    "schedule",
)
ELSEWHERE = {
    "data": "tests/data; data=large has to be fetched first",
    "experiment": "tests/test_build.py and the runs of docs/LOG.md",
    "model": "tests/golden/test_sizes.py builds every preset; this file trains the smallest",
    "tokenizer": "here and below",
    "trainer": "here",
    "parallel": "tests/distributed",
    "objective": "pretraining here; the others need data of their own: tests/distributed/test_post_training.py",
    "reward": "tests/plugins/reward; objectives of pretraining have none",
    "hydra": "tests/study: the sweeper of studies",
    "logger": "tests/plugins/logger; wandb in tests/smoke/test_commands.py",
    "benchmarks": "tests/evaluation/benchmarks",
    "callbacks": "tests/training/callbacks",
}
"""Kinds that are no part of a model, and where they are tried."""

SHORT = [
    "model=tiny", "run.tokens=896", "run.validate_every_tokens=100000000", "data.sequence_length=64",
    "data.micro_batch_size=2", "data.global_batch_size.peak=2", "data.validation_tokens=256", "data.questions=8",
    "benchmarks=none", "precision=fp32",
]  # fmt: skip


def options(kind: str) -> list[str]:
    return sorted(path.stem for path in (ROOT / "conf" / kind).glob("*.yaml"))


def configured(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", overrides=[*SHORT, *overrides])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[DictConfig], RunFolder]]:
    """trained(config): its finished run. Equal configs are trained once: an option may be the default of its kind.

    The default data is made once; each run continues its stream from the beginning.
    """
    data = build_data(configured())
    folders: dict[str, RunFolder] = {}

    def run_of(config: DictConfig) -> RunFolder:
        key = OmegaConf.to_yaml(config)
        if key not in folders:
            config.run.dir = str(tmp_path_factory.mktemp("runs") / "run")
            run = build_run(config)
            run.trainer.fit(run.module, run.data)
            folders[key] = run.folder
        return folders[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dsv3.training.run, "build_data", lambda config, tokenizer=None: data)
        yield run_of


def assert_learnt(losses: pd.Series) -> None:
    assert len(losses) == 7
    assert all(map(math.isfinite, losses))
    assert losses.iloc[-3:].mean() < losses.iloc[:3].mean() - 0.2


@pytest.mark.parametrize(("kind", "option"), [(kind, option) for kind in KINDS for option in options(kind)])
def test_trains_through_its_one_key(
    trained: Callable[[DictConfig], RunFolder], kind: str, option: str, tmp_path: Path
) -> None:
    config = configured(f"{kind}={option}", "logger=none")
    device = settled(config, RunFolder(tmp_path)).trainer.accelerator
    problems = instantiate(config.precision).check(torch.device(device))
    if problems:
        config.run.dir = str(tmp_path / "run")
        with pytest.raises(ValueError, match=re.escape(problems[0])):
            build_run(config)
        assert not (tmp_path / "run").exists(), "it stops before any work"
        return
    assert_learnt(trained(config).read("metrics/train").loss)


def test_every_kind_is_walked() -> None:
    folders = {path.name for path in (ROOT / "conf").iterdir() if path.is_dir()}
    assert set(KINDS) <= folders <= set(KINDS) | set(ELSEWHERE)


@pytest.mark.slow
def test_deepseeks_tokenizer_trains(tmp_path: Path) -> None:
    """On the default data too, which has to be encoded with it first."""
    run = build_run(configured("tokenizer=deepseek", "logger=none", f"run.dir={tmp_path}/run"))
    run.trainer.fit(run.module, run.data)
    train = RunFolder(tmp_path / "run").read("metrics/train")
    assert_learnt(train.loss)


COMBINED = ("attention", "router", "balancing")


@pytest.fixture(scope="module")
def combined() -> Callable[..., DictConfig]:
    """combined(attention, router, balancing): their config, put together from one of each option.

    An option sets its own part alone, so that the parts of a combination are those of its options.
    """

    def others(config: DictConfig, kind: str) -> DictConfig:
        return OmegaConf.masked_copy(config, [key for key in config if key != kind])

    base = configured()
    parts: dict[tuple[str, str], Any] = {}
    for kind in COMBINED:
        for option in options(kind):
            config = configured(f"{kind}={option}")
            assert others(config, kind) == others(base, kind)
            parts[kind, option] = config[kind]

    def build(*names: str) -> DictConfig:
        config = copy.deepcopy(base)
        for kind, name in zip(COMBINED, names, strict=True):
            config[kind] = parts[kind, name]
        return config

    return build


@pytest.mark.parametrize("names", itertools.product(*map(options, COMBINED)))
def test_every_combination_builds_and_runs(combined: Callable[..., DictConfig], names: tuple[str, str, str]) -> None:
    model = build_model(combined(*names))
    tokens_BT = torch.arange(16).view(2, 8)
    batch = MicroBatch(tokens_BT, tokens_BT, torch.arange(8).expand(2, 8), torch.ones_like(tokens_BT), tokens_BT * 0)
    output = model(batch, with_mtp=True)
    assert output.hidden_BTD.isfinite().all()
    for name, moe in model.moe_layers():
        loss = moe.balancing.loss(output.routings[name], (2, 8 - name.startswith("mtp")), *mask(name), 0)
        assert loss.isfinite()


def mask(name: str) -> list[torch.Tensor]:
    return [torch.ones(2, 8 - name.startswith("mtp"), dtype=torch.bool)]
