"""Quantisation-error metrics of the precision, measured in one step per interval."""

from typing import Any

import lightning

from dsv3.bounds import NonNegativeInt
from dsv3.contracts import MeasuresQuantisation, Step
from dsv3.model.decoder import Decoder
from dsv3.training.callbacks.intervals import crossed
from dsv3.training.callbacks.phases import Phase
from dsv3.training.lightning_module import LanguageModel


class MeasureQuantisation(lightning.Callback):
    """Measures during whole training steps, the first among them, and changes nothing in them.

    Writes `metrics/quantisation`: tokens (before the step), role, tensor, snr_db, underflow, saturation, amax.
    every_tokens: 0 measures nothing.
    """

    phase: Phase = "observe"

    def __init__(self, *, every_tokens: NonNegativeInt) -> None:
        self.every_tokens = every_tokens
        self.measured: MeasuresQuantisation | None = None

    def check_model(self, model: Decoder) -> None:
        """Raises ValueError where the precision has nothing to measure."""
        if self.every_tokens and not isinstance(model.precision, MeasuresQuantisation):
            what = f"{type(model.precision).__name__} does not measure what it quantises; set 0"
            raise ValueError(f"callbacks.quantisation.every_tokens={self.every_tokens}: {what}")

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: LanguageModel, batch: Step, batch_idx: int
    ) -> None:
        before = pl_module.tokens_seen
        after = before + sum(micro.tokens_BT.numel() for micro in batch.micro_batches)
        precision = pl_module.model.precision
        due = self.every_tokens and (before == 0 or crossed(self.every_tokens, before, after))
        self.measured = precision if due and isinstance(precision, MeasuresQuantisation) else None
        if self.measured is not None:
            self.measured.start_measuring()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: LanguageModel, outputs: Any, batch: Step, batch_idx: int
    ) -> None:
        if self.measured is None:
            return
        table = pl_module.folder.table("metrics/quantisation")
        before = pl_module.record.tokens_before
        values: dict[str, float] = {"tokens": before}
        for (role, tensor), loss in self.measured.stop_measuring().items():
            table.append({"tokens": before, "role": role, "tensor": tensor, **loss._asdict()})
            values |= {f"quantisation/{role}/{tensor}/{name}": value for name, value in loss._asdict().items()}
        for logger in trainer.loggers:
            logger.log_metrics(values)
