"""Per-step logging to the run folder and the loggers. Tokens are the x-axis."""

import time
from collections.abc import Mapping
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.loggers import WandbLogger
from omegaconf import OmegaConf

from dsv3.contracts import Step
from dsv3.runtime import peak_resident_bytes
from dsv3.training.callbacks.guard import RollBack
from dsv3.training.callbacks.phases import Phase
from dsv3.training.lightning_module import LanguageModel


def peak_memory(device: torch.device) -> dict[str, int]:
    """Bytes that this process has held at most: resident, and what torch allocated on the GPU."""
    peaks = {"resident": peak_resident_bytes()}
    return peaks | {"cuda": torch.cuda.max_memory_allocated(device)} if device.type == "cuda" else peaks


HISTOGRAM_STEPS = 10  # steps between load histograms in wandb


class Record(lightning.Callback):
    """Three tables: `metrics/train` (the figures of a step), `metrics/experts` (load and bias of each MoE layer, one
    number an expert), `timing/train` (seconds of a step, peak memory of this process so far in bytes, estimated seconds
    left: measurements of the machine go to `timing/` only).
    """

    phase: Phase = "record"

    def __init__(self) -> None:
        self.started = 0.0
        self.tokens_per_second = 0.0
        self.seconds_left = 0.0
        self.peak_memory: dict[str, int] = {}  # kind -> bytes
        self.first: tuple[float, int] | None = None  # end of this process's first step: clock, tokens

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
        self.peak_memory = peak_memory(pl_module.device)
        self.seconds_left = self._estimated_left(pl_module)
        peaks = {f"peak_{kind}_bytes": count for kind, count in self.peak_memory.items()}
        timing = {"tokens": record.tokens, "seconds": seconds, **peaks, "seconds_left": self.seconds_left}
        folder.table("timing/train").append(timing)
        experts = folder.table("metrics/experts")
        for layer, load_E in record.loads.items():
            bias = record.biases[layer].tolist()
            experts.append({"tokens": record.tokens, "layer": layer, "load": load_E.tolist(), "bias": bias})
        self._log(trainer, record.row() | {"tokens_per_second": self.tokens_per_second}, record.loads)

    def _estimated_left(self, pl_module: LanguageModel) -> float:
        """Seconds to the last step, at the pace since this process's first one, pauses for evaluation included."""
        now, record = time.perf_counter(), pl_module.record
        began, before = self.first or (self.started, record.tokens_before)
        self.first = self.first or (now, record.tokens)
        left = pl_module.total_tokens - record.tokens
        if pl_module.max_steps >= 0:
            of_a_step = record.tokens - record.tokens_before
            left = min(left, (pl_module.max_steps - record.step) * of_a_step)
        return max(left, 0) * (now - began) / max(record.tokens - before, 1)

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
