"""Sampled answers: what the policy wrote in the latest step, at intervals, and whether sampler and training agree."""

import logging
from typing import Any

import lightning

from dsv3.bounds import PositiveFloat, PositiveInt
from dsv3.contracts import Step
from dsv3.monitoring.alerts import Alert
from dsv3.training.callbacks.intervals import crossed
from dsv3.training.callbacks.phases import Phase
from dsv3.training.lightning_module import LanguageModel

log = logging.getLogger(__name__)

MISMATCH = "rollout_mismatch"


class Rollouts(lightning.Callback):
    """Writes `metrics/rollouts`: tokens, prompt, answer, reward, ... of the first answers of a step.

    An objective that samples nothing has none. Where the sampler's log-probabilities differ from those of training by
    more than `largest_mismatch` nats per token in the mean, an alert is recorded: the policy gradient is then that of
    another policy.
    """

    phase: Phase = "record"

    def __init__(self, *, every_tokens: PositiveInt, answers: PositiveInt, largest_mismatch: PositiveFloat) -> None:
        self.every_tokens, self.answers, self.largest_mismatch = every_tokens, answers, largest_mismatch
        self.is_apart = False

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: LanguageModel, outputs: Any, batch: Step, batch_idx: int
    ) -> None:
        if not pl_module.rollouts:
            return
        record = pl_module.record
        is_first = record.tokens_before == 0
        if is_first or pl_module.finished or crossed(self.every_tokens, record.tokens_before, record.tokens):
            table = pl_module.folder.table("metrics/rollouts")
            for row in pl_module.rollouts[: self.answers]:
                table.append({"tokens": record.tokens, **row})
        self._compare(pl_module, record.figures.get(MISMATCH, 0.0))

    def _compare(self, pl_module: LanguageModel, mismatch: float) -> None:
        is_apart = mismatch > self.largest_mismatch
        if is_apart and not self.is_apart:
            text = f"sampler and training differ by {mismatch:.3f} nats per token in the mean"
            log.warning("%s tokens: %s", f"{pl_module.tokens_seen:,}", text)
            alert = Alert(pl_module.tokens_seen, "", "rollout mismatch", -1, mismatch, text)
            pl_module.folder.table("metrics/alerts").append(alert._asdict())
        self.is_apart = is_apart

    def state_dict(self) -> dict[str, Any]:
        return {"is_apart": self.is_apart}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.is_apart = state_dict["is_apart"]
