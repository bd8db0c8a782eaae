"""Histories of amax (delayed scaling): on every rank those of one process."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor

from tests.distributed.ranks import fitted
from tests.distributed.test_parallel import RUNS
from tests.distributed.workers import Workers

Compose = Callable[..., DictConfig]
TOLERANCES = {"sharded 2": 0.0, "pipeline 2": 0.0, "experts 2": 0.1}
"""Relative error of their amax. Experts on several ranks sum a token's outputs in another order: BF16 rounds it."""


def histories(config: DictConfig) -> dict[str, Tensor]:
    run = fitted(config)
    run.folder.release()
    return {name: value for name, value in run.module.model.state_dict().items() if name.endswith("precision_history")}


@pytest.mark.parametrize(
    "layout", ["sharded 2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("pipeline 2", "experts 2"))]
)
def test_every_rank_has_the_history_of_one_process(
    composed: Compose, workers: Workers, tmp_path: Path, layout: str
) -> None:
    """In the second step: in the first, scales are those of what a rank has, as there is no history."""

    def run_of(name: str, steps: int, *overrides: str) -> DictConfig:
        return composed(
            "precision=fp8_tensorwise", "precision.amax_history=3", "optimizer.newton_schulz_dtype=float32",
            "data.micro_batches=4", "callbacks.monitor=null", "callbacks.validate=null", "callbacks.ema=null",
            f"trainer.max_steps={steps}", f"run.dir={tmp_path / name}", *overrides,
        )  # fmt: skip

    first = histories(run_of("one", 1))
    shutil.copytree(tmp_path / "one", tmp_path / "ranks")
    one = histories(run_of("one", 2))
    of_ranks = workers.run(histories, run_of("ranks", 2, *RUNS[layout]), ranks=2)
    assert {name for ours in of_ranks for name in ours} == one.keys()
    for name, history in one.items():
        newest, before, never = history.unbind(1)
        assert torch.equal(before, first[name][:, 0])
        assert (before > 0).all()
        assert not never.any()
        found = [ours[name] for ours in of_ranks if name in ours]
        assert all(torch.equal(ours, found[0]) for ours in found)
        assert torch.equal(found[0][:, 1:], history[:, 1:])
        x, w, dy = ((found[0][:, 0] - newest).abs() / newest).tolist()
        assert w == 0
        assert max(x, dy) <= TOLERANCES[layout], name
