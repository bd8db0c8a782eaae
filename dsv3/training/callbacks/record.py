"""Per-step logging to the run folder and the loggers. Tokens are the x-axis."""

import time
from collections.abc import Mapping
from typing import Any

import lightning
import numpy as np
from lightning.pytorch.loggers import WandbLogger
from omegaconf import OmegaConf

from dsv3.contracts import Step
from dsv3.training.callbacks.guard import RollBack
from dsv3.training.callbacks.phases import Phase
from dsv3.training.lightning_module import LanguageModel

HISTOGRAM_STEPS = 10  # steps between load histograms in wandb


class Record(lightning.Callback):
    """Three tables: `metrics/train` (the figures of a step), `metrics/experts` (load and bias of each MoE layer, one
    number an expert), `timing/train` (seconds of a step: wall-clock measurements go to `timing/` only).
    """

    phase: Phase = "record"

    def __init__(self) -> None:
        self.started = 0.0
        self.tokens_per_second = 0.0

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: LanguageModel) -> None:
        settings = OmegaConf.to_container(pl_module.config, resolve=True)
        for logger in trainer.loggers:
            logger.log_hyperparams(settings)  # type: ignore[arg-type]
            if isinstance(logger, WandbLogger):
                logger.experiment.define_metric("tokens")
                logger.experiment.define_metric("*", step_metric="tokens", step_sync=True)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: LanguageModel, batch: Step, batch_idx: int
    ) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: LanguageModel, outputs: Any, batch: Step, batch_idx: int
    ) -> None:
        seconds = time.perf_counter() - self.started
        record, folder = pl_module.record, pl_module.folder
        self.tokens_per_second = (record.tokens - record.tokens_before) / seconds
        folder.table("metrics/train").append(record.row())
        folder.table("timing/train").append({"tokens": record.tokens, "seconds": seconds})
        experts = folder.table("metrics/experts")
        for layer, load_E in record.loads.items():
            bias = record.biases[layer].tolist()
            experts.append({"tokens": record.tokens, "layer": layer, "load": load_E.tolist(), "bias": bias})
        self._log(trainer, record.row() | {"tokens_per_second": self.tokens_per_second}, record.loads)

    def teardown(self, trainer: lightning.Trainer, pl_module: LanguageModel, stage: str) -> None:
        """End the wandb run with the training: the next one in this process, of a sweep, has one of its own."""
        self._finish(trainer, exit_code=0)

    def on_exception(self, trainer: lightning.Trainer, pl_module: LanguageModel, exception: BaseException) -> None:
        """`teardown` is not called. Training that rolls back goes on in the same wandb run."""
        if not isinstance(exception, RollBack):
            self._finish(trainer, exit_code=1)

    def _finish(self, trainer: lightning.Trainer, *, exit_code: int) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.finish(exit_code=exit_code)

    def _log(self, trainer: lightning.Trainer, row: Mapping[str, float], loads: Mapping[str, np.ndarray]) -> None:
        values = {(name if name == "tokens" or "/" in name else f"train/{name}"): v for name, v in row.items()}
        for logger in trainer.loggers:
            histograms: dict[str, Any] = {}
            if isinstance(logger, WandbLogger) and row["step"] % HISTOGRAM_STEPS == 0:
                import wandb

                histograms = {f"load/{name}": wandb.Histogram(list(c / c.mean())) for name, c in loads.items()}
            logger.log_metrics({**values, **histograms})
