"""Validation every so many tokens, before the first step and after the last."""

from typing import Any

import lightning

from dsv3.checkpoint.run_folder import RunFolder
from dsv3.evaluation.held_out import domain_scores
from dsv3.training.callbacks.ema import EMA
from dsv3.training.callbacks.intervals import crossed


class Validate(lightning.Callback):
    """Writes `metrics/validation`: tokens, weights (live or ema), domain, loss, bpb. Touches no training state."""

    def __init__(self, *, every_tokens: int, folder: RunFolder, ema: EMA) -> None:
        self.every_tokens = every_tokens
        self.table = folder.table("metrics/validation")
        self.ema = ema
        self.validated_at: dict[str, int] = {}  # tokens, by which weights; so that resuming repeats nothing
        self.latest_bpb: dict[str, float] = {}

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if pl_module.tokens_seen == 0:
            self.validate(trainer, pl_module, "live")

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if pl_module.finished or crossed(self.every_tokens, batch.tokens_before, pl_module.tokens_seen):
            self.validate(trainer, pl_module, "live")
        if pl_module.finished:
            with self.ema.applied(pl_module.model):
                self.validate(trainer, pl_module, "ema")

    def state_dict(self) -> dict[str, Any]:
        return {"validated_at": self.validated_at, "latest_bpb": self.latest_bpb}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.validated_at = state_dict["validated_at"]
        self.latest_bpb = state_dict["latest_bpb"]

    def validate(self, trainer: Any, pl_module: Any, weights: str) -> None:
        if self.validated_at.get(weights) == pl_module.tokens_seen:
            return
        self.validated_at[weights] = pl_module.tokens_seen
        data = trainer.datamodule
        pl_module.eval()
        scores = domain_scores(pl_module.model, data.validation_batches(), data.domains, data.validation_bytes())
        pl_module.train()
        tokens = pl_module.tokens_seen
        for domain, score in scores.items():
            self.table.append({"tokens": tokens, "weights": weights, "domain": domain, **score._asdict()})
        if weights == "live":
            self.latest_bpb = {domain: score.bpb for domain, score in scores.items()}
        for logger in trainer.loggers:
            values = {f"validation_{weights}/{k}/{d}": v for d, s in scores.items() for k, v in s._asdict().items()}
            logger.log_metrics(values | {"tokens": tokens})
