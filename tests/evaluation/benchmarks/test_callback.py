"""Benchmarks in training: written down, repeated by no resume, and without a trace in training itself."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from dsv3.checkpoint.run_folder import RunFolder, load_checkpoint
from dsv3.training.callbacks.intervals import ends_early
from dsv3.training.callbacks.run_benchmarks import Benchmarks
from dsv3.training.run import build_run
from dsv3.training.summary import benchmark_scores
from tests.smoke.test_resume import differences

SUITE = ["+benchmarks.tasks.rg_arithmetic={limit: 4}", "+benchmarks.tasks.rg_algorithmic={limit: 3, temperature: 1.0}"]


def train(compose: Callable[..., DictConfig], folder: Path, *more: str) -> tuple[Any, RunFolder]:
    config = compose(
        "precision=fp32", f"run.dir={folder}", "run.tokens=2048", "run.checkpoint_every_tokens=1024", *more
    )
    run = build_run(config)
    run.trainer.fit(run.module, run.data, ckpt_path=run.resume_from, weights_only=True)
    return run, run.folder


@pytest.fixture(scope="module")
def whole(composed: Callable[..., DictConfig], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, RunFolder]:
    """A run with benchmarks every 512 tokens, from beginning to end."""
    return train(composed, tmp_path_factory.mktemp("runs") / "whole", *SUITE, "benchmarks.every_tokens=512")


def test_training_is_bitwise_the_same_with_and_without(
    composed: Callable[..., DictConfig], whole: tuple[Any, RunFolder], tmp_path: Path
) -> None:
    _, plain = train(composed, tmp_path / "without")
    run, observed = whole
    for table in ("metrics/train", "metrics/experts", "metrics/validation"):
        assert plain.read(table).equals(observed.read(table))
    ends = [load_checkpoint(folder.checkpoints()[-1]) for folder in (plain, observed)]
    assert not differences(*(end["state_dict"] for end in ends))
    assert not differences(*(end["optimizer_states"] for end in ends))
    assert not differences(*(end["callbacks"]["EMA"] for end in ends))
    table = observed.read("metrics/benchmarks")
    assert sorted(set(table.tokens)) == [0, 512, 1024, 1536, 2048]
    assert set(table.task) == {"rg_arithmetic", "rg_algorithmic"}
    assert {"exact_match", "answer_bpb"} <= set(table.metric)
    assert observed.read("timing/benchmarks").tokens.tolist() == [0, 512, 1024, 1536, 2048]
    assert plain.read("metrics/benchmarks").empty
    assert run.module.training

    summary = benchmark_scores(observed)
    bpb = next(row for row in summary if (row["task"], row["metric"]) == ("rg_arithmetic", "answer_bpb"))
    assert bpb["n"] == 4
    assert bpb["before"] != bpb["after"]
    assert bpb["after_stderr"] > 0


def test_resuming_repeats_no_benchmark(
    composed: Callable[..., DictConfig], whole: tuple[Any, RunFolder], tmp_path: Path
) -> None:
    """Stopped after the checkpoint at 1024 tokens and continued: the table is that of a run that was never stopped."""
    folder = tmp_path / "stopped"
    stopped, _ = train(composed, folder, *SUITE, "benchmarks.every_tokens=512", "trainer.max_steps=4")
    stopped.folder.release()
    _, continued = train(composed, folder, *SUITE, "benchmarks.every_tokens=512")
    assert continued.read("metrics/benchmarks").equals(whole[1].read("metrics/benchmarks"))


def test_a_task_that_cannot_run_is_named_once_and_left_out(
    composed: Callable[..., DictConfig], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tasks = ["+benchmarks.tasks.stdlib_infilling={limit: 2}", "+benchmarks.tasks.rg_arithmetic={limit: 2}"]
    _, folder = train(composed, tmp_path / "run", *tasks)
    assert set(folder.read("metrics/benchmarks").task) == {"rg_arithmetic"}
    named = [record for record in caplog.records if "skipping benchmark stdlib_infilling" in record.getMessage()]
    assert len(named) == 1
    assert torch.is_grad_enabled()


STEPS_OF_AT_MOST_8_ROWS = "+data.global_batch_size={peak: 8, start: 0.5, segments: [{until: 1.0, to: 1.0}]}"


@pytest.mark.parametrize(
    ("options", "early"),
    [
        ((), False),
        (("trainer.max_steps=4",), True),
        (("trainer.max_steps=4", "run.checkpoint_every_tokens=1024"), False),  # 4 steps of 8 rows of 32 tokens
        (("trainer.max_steps=20",), False),  # the whole run
    ],
)
def test_a_run_that_ends_before_its_first_checkpoint_runs_none(
    composed: Callable[..., DictConfig], options: tuple[str, ...], early: bool, caplog: pytest.LogCaptureFixture
) -> None:
    config = composed(STEPS_OF_AT_MOST_8_ROWS, *SUITE, *options)
    module: Any = SimpleNamespace(config=config, folder=SimpleNamespace(table=lambda name: []))
    callback = Benchmarks(every_tokens=None, before=True)
    with caplog.at_level("INFO"):
        callback.setup(None, module, "fit")
    assert callback.wanted != early
    assert (f"no benchmarks: {' '.join(options)} ends before" in caplog.text) == early
    assert not ends_early(composed(*options)), "the tokens of its steps are not known"
