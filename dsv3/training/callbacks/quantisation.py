"""What the precision's formats lose, measured in a step every so many tokens."""

from typing import Any

import lightning

from dsv3.checkpoint.run_folder import RunFolder
from dsv3.contracts import MeasuresQuantisation
from dsv3.training.callbacks.intervals import crossed


class MeasureQuantisation(lightning.Callback):
    """Measures during whole training steps, the first among them, and changes nothing in them.

    Writes `metrics/quantisation`: tokens (before the step), role, tensor, snr_db, underflow, saturation, amax.
    """

    def __init__(self, *, every_tokens: int, folder: RunFolder, precision: MeasuresQuantisation) -> None:
        self.every_tokens = every_tokens
        self.table = folder.table("metrics/quantisation")
        self.precision = precision
        self.measuring = False

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        before = batch.tokens_before
        after = before + sum(micro.tokens_BT.numel() for micro in batch.micro_batches)
        self.measuring = before == 0 or crossed(self.every_tokens, before, after)
        if self.measuring:
            self.precision.start_measuring()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if not self.measuring:
            return
        losses = self.precision.stop_measuring()
        values: dict[str, float] = {"tokens": batch.tokens_before}
        for (role, tensor), loss in losses.items():
            self.table.append({"tokens": batch.tokens_before, "role": role, "tensor": tensor, **loss._asdict()})
            values |= {f"quantisation/{role}/{tensor}/{name}": value for name, value in loss._asdict().items()}
        for logger in trainer.loggers:
            logger.log_metrics(values)
