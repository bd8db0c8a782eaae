"""Checkpoint folders: written by any number of ranks, read by any other, whole or not taken for a checkpoint."""

import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor

from dsv3.checkpoint.checkpoint_folder import MANIFEST, META, Stored, map_named, read
from dsv3.checkpoint.huggingface import export_run
from dsv3.checkpoint.loading import load_run
from dsv3.checkpoint.run_folder import RunFolder, find_run, is_valid, load_checkpoint
from dsv3.distributed import save_folder as writing
from dsv3.distributed.save_folder import save_folder
from dsv3.training.resume import prepare
from tests.distributed.ranks import Trained, train
from tests.distributed.workers import Workers

Compose = Callable[..., DictConfig]

LAYOUTS = {
    "experts 2 x sharded 2": ("parallel=experts", "parallel.experts=2", "trainer.devices=4"),
    "sharded 2": ("parallel=sharded", "trainer.devices=2"),
    "one process": (),
}
STEP = 512  # tokens


def run_of(composed: Compose, path: Path, steps: int, *overrides: str) -> DictConfig:
    """Newton-Schulz in FP32, and an epsilon above the rounding of a gradient that is zero."""
    return composed(
        "precision=fp32", "optimizer.newton_schulz_dtype=float32", "optimizer.eps=1e-6", "data.micro_batches=4",
        "run.tokens=4096", "run.checkpoint_every_tokens=1024", "run.keep_checkpoints=9", "callbacks.monitor=null",
        "run.checkpoint_format=folder", f"run.dir={path}", f"trainer.max_steps={steps}", *overrides,
    )  # fmt: skip


def trained(workers: Workers, config: DictConfig) -> Trained:
    """What `config` trains, on as many ranks as it asks for."""
    ranks = config.trainer.devices
    result = workers.run(train, config, ranks=ranks)[0] if ranks > 1 else train(config)
    assert result is not None
    return result


def tensors(content: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    map_named(found.__setitem__, content)
    return found


def assert_close(ours: Any, theirs: Any) -> None:
    mine, others = tensors(ours), tensors(theirs)
    assert mine.keys() == others.keys()
    for name, tensor in others.items():
        torch.testing.assert_close(mine[name], tensor, rtol=0, atol=1e-5, msg=name)


@pytest.fixture(scope="module")
def in_a_file(composed: Compose, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """8 steps in one process, which writes files."""
    result = train(run_of(composed, tmp_path_factory.mktemp("file"), -1, "run.checkpoint_format=file"))
    assert result is not None
    return result


@pytest.fixture(scope="module")
def elastic(composed: Compose, workers: Workers, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, Path]:
    """The same on 4 ranks, then 2, then 1, then 4, which write folders."""
    path = tmp_path_factory.mktemp("folder")
    legs = [("experts 2 x sharded 2", 2), ("sharded 2", 4), ("one process", 6), ("experts 2 x sharded 2", -1)]
    for layout, steps in legs:
        result = trained(workers, run_of(composed, path, steps, *LAYOUTS[layout]))
    return result, path


@pytest.fixture
def run(elastic: tuple[Trained, Path], tmp_path: Path) -> RunFolder:
    """A copy of that run, to damage."""
    import shutil

    return RunFolder(shutil.copytree(elastic[1], tmp_path / "run"))


def test_any_number_of_ranks_goes_on_from_a_folder(elastic: tuple[Trained, Path], in_a_file: Trained) -> None:
    ours, path = elastic
    checkpoints = RunFolder(path).checkpoints()
    assert [len(list(each.glob("shard-*"))) for each in checkpoints] == [4, 2, 1, 4]
    np.testing.assert_allclose(ours.losses, in_a_file.losses, rtol=2e-6)
    assert ours.loads == in_a_file.loads
    assert ours.biases == in_a_file.biases


def test_a_folder_of_four_ranks_holds_what_the_file_of_one_holds(
    elastic: tuple[Trained, Path], in_a_file: Trained
) -> None:
    assert_close(elastic[0].state, in_a_file.state)
    assert elastic[0].state["dsv3"]["tokens_seen"] == in_a_file.state["dsv3"]["tokens_seen"] == 8 * STEP
