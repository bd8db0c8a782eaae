"""Exponential moving average of the weights, kept on the CPU and updated after every optimiser step.

    ema <- decay * ema + (1 - decay) * weights

Buffers (the routing bias) are copied, not averaged: a bias belongs to the live router.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from dsv3.checkpoint.loading import set_weights


class EMA(lightning.Callback):
    """`weights` holds the average, FP32, by parameter name."""

    def __init__(self, *, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema.decay={decay}: at least 0 and below 1")
        self.decay = decay
        self.weights: dict[str, Tensor] = {}

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: Any) -> None:
        if not self.weights:
            self.weights = {name: p.detach().to("cpu", copy=True) for name, p in pl_module.model.named_parameters()}

    @torch.no_grad()
    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        live = [p.detach().cpu() for p in pl_module.model.parameters()]
        torch._foreach_lerp_(list(self.weights.values()), live, 1 - self.decay)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The averaged weights in the model's place, the live ones put back after."""
        live = {name: p.detach().clone() for name, p in model.named_parameters()}
        try:
            set_weights(model, self.weights)
            yield
        finally:
            set_weights(model, live)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.weights = state_dict["weights"]
