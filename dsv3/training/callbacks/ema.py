"""Exponential moving average of the weights, kept on the CPU and updated after every optimiser step.

    ema <- decay * ema + (1 - decay) * weights

Buffers (the routing bias) are copied, not averaged: a bias belongs to the live router. From a GPU the weights are
copied to pinned memory without waiting, and averaged one step later, when the copy has long arrived. A rank averages
its own parts of sharded weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from dsv3.bounds import Fraction
from dsv3.checkpoint.loading import set_weights
from dsv3.contracts import Step
from dsv3.distributed.shard import part_like, sharded_like
from dsv3.model.layers import local
from dsv3.training.callbacks.phases import Phase
from dsv3.training.lightning_module import LanguageModel


class EMA(lightning.Callback):
    """decay: per optimiser step, at least 0 and below 1."""

    phase: Phase = "average"

    def __init__(self, *, decay: Fraction) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"callbacks.ema.decay={decay}: must be at least 0 and below 1")
        self.decay = decay
        self._average: dict[str, Tensor] = {}
        self._like: dict[str, Tensor] = {}  # the model's parameters, once training has begun
        self._arriving: _Copies | None = None

    @property
    def weights(self) -> dict[str, Tensor]:
        """The average of this rank's parts, FP32, by parameter name."""
        self._take_in()
        return self._average

    def on_train_start(self, trainer: lightning.Trainer, pl_module: LanguageModel) -> None:
        self._like = dict(pl_module.model.named_parameters())
        if self._average:  # of a checkpoint
            self._average = {name: local(part_like(self._average[name], p)).cpu() for name, p in self._like.items()}
        else:
            self._average = {name: local(p.detach()).to("cpu", copy=True) for name, p in self._like.items()}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: LanguageModel, outputs: Any, batch: Step, batch_idx: int
    ) -> None:
        live = [local(p.detach()) for p in pl_module.model.parameters()]
        if pl_module.device.type != "cuda":
            self._add(live)
            return
        self._take_in()
        self._arriving = _Copies(live)

    def _add(self, live: list[Tensor]) -> None:
        torch._foreach_lerp_(list(self._average.values()), live, 1 - self.decay)

    def _take_in(self) -> None:
        if self._arriving is not None:
            live, self._arriving = self._arriving.arrived(), None
            self._add(live)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The averaged weights in the model's place, the live ones put back after."""
        live = {name: local(p.detach()).clone() for name, p in model.named_parameters()}
        try:
            set_weights(model, self.weights)
            yield
        finally:
            set_weights(model, live)

    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": {name: sharded_like(part, self._like.get(name, part)) for name, part in self.weights.items()}
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._average = state_dict["weights"]


class _Copies:
    """Tensors of a GPU on their way to pinned memory."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.copies = [torch.empty(t.shape, dtype=t.dtype, pin_memory=True) for t in tensors]
        for copy, tensor in zip(self.copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        self.event = torch.cuda.Event()
        self.event.record()

    def arrived(self) -> list[Tensor]:
        self.event.synchronize()
        return self.copies
