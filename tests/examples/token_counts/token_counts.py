"""A callback of one's own: records which tokens training has seen, in a table of its own. Lives outside the project."""

from typing import Any

import lightning
import torch
from torch import Tensor

from dsv3.contracts import Step


class TokenCounts(lightning.Callback):
    """Writes `metrics/token_counts`: tokens (trained on), distinct (token ids seen so far), every so many tokens.

    The ids are marked on the device; the number comes to the host when a row is due, not at every step.
    """

    phase = "observe"

    def __init__(self, *, every_tokens: int) -> None:
        if every_tokens < 1:
            raise ValueError(f"callbacks.mine.every_tokens={every_tokens}: must be at least 1")
        self.every_tokens = every_tokens
        self.seen_V: Tensor | None = None

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if self.seen_V is None:
            self.seen_V = torch.zeros(len(pl_module.model.head_weight), dtype=torch.bool)
        self.seen_V = self.seen_V.to(pl_module.device)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: Any, outputs: Any, batch: Step, batch_idx: int
    ) -> None:
        assert self.seen_V is not None
        for micro in batch.micro_batches:
            self.seen_V.index_fill_(0, micro.tokens_BT.flatten(), True)
        tokens = pl_module.record.tokens
        if tokens // self.every_tokens > batch.tokens_before // self.every_tokens:
            table = pl_module.folder.table("metrics/token_counts")
            table.append({"tokens": tokens, "distinct": int(self.seen_V.sum())})

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen_V}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seen_V = state_dict["seen"]
