"""Every shipped logger passes `check_logger`; loggers with one fault each do not."""

from functools import partial
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger

from dsv3.testing.logger import check_logger
from plugins.logger.none import no_logger
from plugins.logger.weights_and_biases import wandb_logger


def test_no_logger_conforms():
    check_logger(no_logger)


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
