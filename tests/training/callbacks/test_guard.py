"""The guard against loss spikes: a planted one is found, written down and acted on by policy."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

import dsv3.training.callbacks.guard
import dsv3.training.lightning_module
import dsv3.training.run
from dsv3.build import build_data
from dsv3.checkpoint.run_folder import RunFolder, load_checkpoint
from dsv3.contracts import Step
from dsv3.reporting.page import write_run_report
from dsv3.training.callbacks.guard import Guard
from dsv3.training.fit import fit
from dsv3.training.run import Run
from dsv3.training.step import StepRecord

Compose = Callable[..., DictConfig]
PLANTED_AT = 3072  # tokens before the step that holds the planted row


def planted(data: Any) -> Any:
    """The synthetic data, with one row of bytes that no other row has in the step after PLANTED_AT tokens."""
    original = data.train_dataloader

    def steps() -> Iterator[Step]:
        for step in original():
            if step.tokens_before == PLANTED_AT:
                first = step.micro_batches[0]
                noise = torch.randint(0, 96, first.tokens_BT.shape, generator=torch.Generator().manual_seed(0))
                step.micro_batches[0] = first._replace(tokens_BT=noise, targets_BT=noise.roll(-1, 1))
            yield step

    data.train_dataloader = steps
    return data


@pytest.fixture(scope="module")
def config(composed: Compose, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., DictConfig]]:
    keys = (
        "run.tokens=4096",
        "run.checkpoint_every_tokens=1280",
        "run.validate_every_tokens=4096",
        "schedule.peak=0.005",
    )
    keys += ("callbacks.guard.min_rise=0.7", "callbacks.guard.window=8")
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dsv3.training.run, "build_data", lambda config, **_: planted(build_data(config)))
        yield lambda name, *more: composed(*keys, f"run.dir={folder}/{name}", *more)


@pytest.fixture(scope="module")
def skipped(config: Callable[..., DictConfig]) -> Run:
    return fit(config("skipped", "callbacks.guard.on_spike=skip"))


def weights(folder: RunFolder) -> dict[str, torch.Tensor]:
    return load_checkpoint(folder.checkpoints()[-1])["state_dict"]


def spikes(folder: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted((folder.path / "spikes").glob("tokens-*.json"))]


def test_record_names_the_documents_and_goes_on(config: Callable[..., DictConfig]) -> None:
    folder = fit(config("record", "callbacks.guard.on_spike=record")).folder
    (spike,) = spikes(folder)
    assert (spike["kind"], spike["policy"], spike["tokens_before"]) == ("loss spike", "record", PLANTED_AT)
    assert spike["loss"] > max(spike["losses_before"])
    assert all(document["micro_batch"] == 0 for document in spike["documents"][:4]), "the planted rows are the worst"
    assert set(spike["documents"][0]) >= {"row", "document", "domain", "loss", "text"}
    assert set(spike["routing"]) == {"layers.1", "layers.2", "mtp.0"}
    assert sum(spike["domains"].values()) == 256
    (alert,) = folder.read("metrics/alerts").query("kind == 'loss spike'").to_dict("records")
    assert alert["tokens"] == PLANTED_AT
    assert f"at {PLANTED_AT:,} tokens: record" in alert["text"]
    page = write_run_report(folder.path).read_text()
    assert f"Loss spike after {PLANTED_AT:,} tokens (record)" in page


def test_skip_skips_the_update(skipped: Run) -> None:
    assert [spike["policy"] for spike in spikes(skipped.folder)] == ["skip"]
    assert skipped.module.tokens_seen == 4096, "the data moves on"
    assert skipped.trainer.global_step == 15, "one update fewer than steps"
    steps = skipped.folder.read("metrics/train").step.tolist()
    assert steps == list(range(1, 17)), "every step has a number of its own"


def test_roll_back_equals_a_run_that_skips_the_update(config: Callable[..., DictConfig], skipped: Run) -> None:
    """From the checkpoint at 2560 tokens on; the spike is in no metric, the update left out is."""
    rolled = fit(config("rolled", "callbacks.guard.on_spike=roll_back", "resume=never"))
    ours, theirs = weights(rolled.folder), weights(skipped.folder)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    alerts = rolled.folder.read("metrics/alerts")
    assert PLANTED_AT in alerts[alerts.kind == "skipped update"].tokens.tolist()
    assert "loss spike" not in set(alerts.kind)
    assert [spike["policy"] for spike in spikes(rolled.folder)] == ["roll_back"]
    assert not list(rolled.folder.path.parent.glob("rolled.old-*")), "`resume=never` is for the first beginning"


def test_rollbacks_are_limited(config: Callable[..., DictConfig]) -> None:
    with pytest.raises(ValueError, match=r"callbacks\.guard\.max_rollbacks=0 reached"):
        fit(config("limited", "callbacks.guard.on_spike=roll_back", "callbacks.guard.max_rollbacks=0"))


def test_a_loss_that_is_not_finite_never_reaches_the_weights(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gradient of the second step is infinite; all weights stay finite and the batch is written down."""
    original = dsv3.training.lightning_module.gradients
    planted_in = iter([False, True])

    def gradients(model: Any) -> Any:
        if next(planted_in, False):
            next(model.parameters()).grad[0, 0] = torch.inf
        return original(model)

    monkeypatch.setattr(dsv3.training.lightning_module, "gradients", gradients)
    run = fit(composed("run.tokens=1024", f"run.dir={tmp_path}/run"))
    (spike,) = spikes(run.folder)
    assert (spike["kind"], spike["policy"], spike["grad_norm"]) == ("non-finite loss", "skip", "inf")
    assert run.trainer.global_step == 3
    assert all(weight.isfinite().all() for weight in weights(run.folder).values())


DIVERGING = ("optimizer=adamw", "schedule=cosine", "schedule.peak=1e25", "run.tokens=25600")


def test_training_that_gives_nan_alone_stops(composed: Compose, tmp_path: Path) -> None:
    """Not at its end, a hundred skipped updates later; and called again, it stops there again."""
    config = composed(*DIVERGING, "callbacks.guard.max_nonfinite=5", f"run.dir={tmp_path}/run")
    for _ in range(2):
        with pytest.raises(ValueError, match=r"callbacks\.guard\.max_nonfinite=5: 5 steps in a row .*schedule\.peak"):
            fit(config)
    folder = RunFolder(tmp_path / "run")
    assert [spike["policy"] for spike in spikes(folder)] == ["skip"] * 5
    assert not (folder.read("metrics/train").loss.isna().sum() > 5)


def test_skipped_updates_count_for_the_step_limit(composed: Compose, tmp_path: Path) -> None:
    more = ("trainer.max_steps=9", "callbacks.guard.max_nonfinite=1000")
    run = fit(composed(*DIVERGING, *more, f"run.dir={tmp_path}/run"))
    steps = run.folder.read("metrics/train").step.tolist()
    assert steps == list(range(1, 10))
    assert run.trainer.global_step < 9
    assert run.module.finished
    assert len(run.folder.checkpoints()) == 1, "the last step leaves a checkpoint"


def test_batches_written_down_are_bounded(composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dsv3.training.callbacks.guard, "BATCHES_KEPT", 3)
    more = ("trainer.max_steps=9", "callbacks.guard.max_nonfinite=1000")
    run = fit(composed(*DIVERGING, *more, f"run.dir={tmp_path}/run"))
    kept = [spike["tokens_before"] for spike in spikes(run.folder)]
    assert kept == [6 * 256, 7 * 256, 8 * 256], "the newest"
    assert len(run.folder.read("metrics/alerts").query("kind == 'non-finite loss'")) > 3, "all are named"


def guard(folder: Path, **changed: Any) -> Guard:
    settings: dict[str, Any] = {
        "on_spike": "record", "on_nonfinite": "skip", "window": 64, "threshold_sigmas": 8.0, "min_rise": 0.5,
        "max_rollbacks": 3, "max_nonfinite": 10,
    }  # fmt: skip
    made = Guard(**settings | changed)
    made.folder, made.alerts = folder, RunFolder(folder).table("metrics/alerts")
    return made


def test_threshold_follows_the_spread_of_the_losses(tmp_path: Path) -> None:
    quiet, noisy, falling = (guard(tmp_path, window=2048) for _ in range(3))
    quiet.losses.extend([3.0] * 20)
    noisy.losses.extend((3 + 0.25 * torch.randn(2048, generator=torch.Generator().manual_seed(1))).tolist())
    falling.losses.extend([5.0 - 0.1 * i for i in range(21)])
    assert quiet.threshold() == 3.5
    assert noisy.threshold() == pytest.approx(3.0 + 8 * 0.25, rel=0.03)
    assert falling.threshold() == pytest.approx(4.5), "a steady fall is no noise"


def test_a_rise_that_lasts_is_no_spike_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skips = guard(tmp_path, on_spike="skip", window=8)
    monkeypatch.setattr(skips, "_log_batch", lambda *_: None)
    losses = [3.0] * 8 + [4.0] * 8
    records = [StepRecord(i, {"loss": loss, "grad_norm": 1.0}, {}, {}, i, i) for i, loss in enumerate(losses)]
    allowed = [skips.allows(Step([], i, {}), record) for i, record in enumerate(records)]
    assert allowed[:8] == [True] * 8
    assert not any(allowed[8:12])
    assert all(allowed[13:])


@pytest.mark.parametrize(
    "wrong", [{"on_spike": "ignore"}, {"on_nonfinite": "record"}, {"window": 2}, {"max_nonfinite": 0}]
)
def test_impossible_settings(tmp_path: Path, wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"guard.{next(iter(wrong))}"):
        guard(tmp_path, **wrong)
