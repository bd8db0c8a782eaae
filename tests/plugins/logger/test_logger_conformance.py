"""Every shipped logger passes `check_logger`; loggers with one fault each do not."""

import re
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from dsv3.checkpoint.run_folder import RunFolder
from dsv3.config.preflight import check
from dsv3.testing.logger import check_logger
from dsv3.training.fit import fit
from dsv3.training.run import build_loggers
from plugins.logger.lightning_loggers import csv_logger, mlflow_logger, tensorboard_logger
from plugins.logger.weights_and_biases import wandb_logger


@pytest.mark.parametrize("factory", [csv_logger, tensorboard_logger])
def test_lightnings_own_loggers_conform(factory):
    check_logger(factory)


def test_mlflow_conforms(tmp_path):
    pytest.importorskip("mlflow")
    check_logger(partial(mlflow_logger, experiment="check", name="check", tracking_uri=None))


def test_csv_and_tensorboard_together_have_tokens_as_their_step(composed, tmp_path):
    """Over two starts of one run; the first is stopped by its cap on steps."""
    keys = ("logger=[csv,tensorboard]", f"run.dir={tmp_path}/run", "callbacks.monitor=null", "run.tokens=768")
    for steps in (2, 3):
        config = composed(*keys, f"trainer.max_steps={steps}")
        assert list(config.logger) == ["csv", "tensorboard"]
        fit(config).folder.release()
    found = [pd.read_csv(tmp_path / "run" / "csv" / f"version_{start}" / "metrics.csv") for start in (0, 1)]
    steps = [frame.step[frame["train/loss"].notna()].tolist() for frame in found]
    assert steps == [[256, 512], [768]]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload().Scalars("train/loss")
    assert [event.step for event in events] == [256, 512, 768]
    losses = RunFolder(tmp_path / "run").read("metrics/train").loss
    assert [event.value for event in events] == pytest.approx(losses.tolist())
    assert pd.concat(found)["train/loss"].dropna().tolist() == pytest.approx(losses.tolist())


def test_none_and_several_are_composed(composed, tmp_path):
    assert build_loggers(composed("logger=none"), RunFolder(tmp_path)) == []
    assert check("train", ["logger=[csv,tensorboard]", "model=tiny"]) == []
    assert check("train", ["logger=csv", "logger.csv.name=x"])[0].key == "logger.csv.name"
    (problem,) = check("train", ["logger.project=mine"])
    assert "write logger.wandb.project=mine" in str(problem)


def test_a_missing_package_and_a_logger_without_a_name_are_found_before_any_work(monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    (problem,) = check("train", ["logger=mlflow"])
    assert str(problem) == "logger=mlflow: needs the package mlflow: pip install mlflow"
    folder = tmp_path / "logger"
    folder.mkdir()
    text = "_target_: plugins.logger.lightning_loggers.csv_logger\n_partial_: true\n"
    (folder / "flat.yaml").write_text(text)
    problems = check("train", ["--config-dir", str(tmp_path), "logger=flat"])
    assert "begin its YAML with # @package logger.mine" in str(problems[0])


@pytest.mark.filterwarnings("ignore:There is a wandb run already")
def test_weights_and_biases_conforms(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    import wandb

    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    check_logger(partial(wandb_logger, project="check", group="check", name="check"))
    wandb.finish()


def test_several_loggers_conform():
    check_logger(lambda *, save_dir: [CSVLogger(save_dir, name="a"), CSVLogger(save_dir, name="b")])


class NeedsStep(CSVLogger):
    def log_metrics(self, metrics, step=None):
        super().log_metrics(metrics, step + 1)


class Finite(CSVLogger):
    def log_metrics(self, metrics, step=None):
        if any(value != value for value in metrics.values()):
            raise ValueError("NaN")


class NewRunsOnly(CSVLogger):
    """Refuses to write over what an earlier logger of the same run wrote."""

    def log_metrics(self, metrics, step=None):
        (Path(self.root_dir).parent / str(metrics["tokens"])).touch(exist_ok=False)


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (lambda *, save_dir: None, "not None"),
        (lambda *, save_dir: [False], "a Lightning Logger, a list of them"),
        (lambda *, save_dir: print, "must give a Lightning Logger"),
        (lambda *, save_dir: NeedsStep(save_dir), "no step"),
        (lambda *, save_dir: Finite(save_dir), "NaN occurs"),
        (lambda *, save_dir: NewRunsOnly(save_dir), "of a resumed run must work"),
    ],
)
def test_faulty_loggers_are_found(factory, words):
    with pytest.raises(AssertionError, match=words):
        check_logger(factory)


def test_the_command_that_uploads_what_was_logged_offline_exists(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from wandb.cli.cli import sync

    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setattr("plugins.logger.weights_and_biases.reachable", lambda: False)
    wandb_logger(save_dir=tmp_path, project="p", group="g", name="n")
    (said,) = caplog.messages
    options = {option for parameter in sync.params for option in parameter.opts}
    assert set(re.findall(r" (--\S+)", said)) == {"--id"} <= options
    assert f"--id $(cat {tmp_path}/wandb_id) {tmp_path}/wandb/offline-run-*" in said


@pytest.mark.parametrize(
    ("key", "mode", "offline"),
    [("", None, True), (None, None, True), ("a key", "disabled", None), ("a key", None, False), ("", "online", False)],
)
def test_an_empty_key_is_none_and_the_mode_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str | None, mode: str | None, offline: bool | None
) -> None:
    for name, value in (("WANDB_API_KEY", key), ("WANDB_MODE", mode)):
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    monkeypatch.setattr("plugins.logger.weights_and_biases.reachable", lambda: True)
    made = wandb_logger(save_dir=tmp_path, project="p", group="g", name="n")
    assert made == [] if offline is None else made._offline == offline
