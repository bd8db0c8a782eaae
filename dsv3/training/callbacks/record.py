"""What is written down of every step, to the run folder and to the loggers. Tokens are the x-axis."""

import time
from typing import Any

import lightning
from lightning.pytorch.loggers import WandbLogger

from dsv3.checkpoint.run_folder import RunFolder

HISTOGRAM_STEPS = 10  # steps between load histograms in wandb


class Record(lightning.Callback):
    """Three tables: `metrics/train` (scalars of a step), `metrics/experts` (load and bias of each MoE layer, one
    number an expert), `timing/train` (seconds of a step: the only one that a clock has a say in).
    """

    def __init__(self, *, folder: RunFolder) -> None:
        self.train = folder.table("metrics/train")
        self.experts = folder.table("metrics/experts")
        self.timing = folder.table("timing/train")
        self.started = 0.0
        self.latest: dict[str, float] = {}

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.define_metric("tokens")
                logger.experiment.define_metric("*", step_metric="tokens", step_sync=True)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        seconds = time.perf_counter() - self.started
        loads = outputs["loads"]
        scalars = {key: value for key, value in outputs.items() if key != "loads"} | {"loss": outputs["loss"].item()}
        tokens = scalars["tokens"]
        self.train.append(scalars)
        self.timing.append({"tokens": tokens, "seconds": seconds})
        moes = dict(pl_module.model.moe_layers())
        for layer, counts_E in loads.items():
            bias_E = moes[layer].balancing.bias
            self.experts.append({"tokens": tokens, "layer": layer, "load": counts_E.tolist(), "bias": bias_E.tolist()})
        rate = (tokens - batch.tokens_before) / seconds
        self.latest = scalars | {"tokens_per_second": rate}
        self._log(trainer, self.latest, loads)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """End the wandb run with the training: the next one in this process, of a sweep, has one of its own."""
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.finish()

    def _log(self, trainer: Any, scalars: dict[str, float], loads: dict[str, Any]) -> None:
        values = {("tokens" if k == "tokens" else k if "/" in k else f"train/{k}"): v for k, v in scalars.items()}
        for logger in trainer.loggers:
            histograms = {}
            if isinstance(logger, WandbLogger) and scalars["step"] % HISTOGRAM_STEPS == 0:
                import wandb

                histograms = {f"load/{name}": wandb.Histogram(list(c / c.float().mean())) for name, c in loads.items()}
            logger.log_metrics(values | histograms)
