"""Per-tensor scales, from the tensor's own amax or, delayed, from earlier steps.

Delayed scaling (arXiv 2209.05433) spares a pass over the tensor before it can be quantised, and pays with numbers that
saturate when amax has grown: scale = max(amax of the last steps) / largest. Before there is any history, the tensor's
own amax serves.

A step's amax is the largest over its micro-batches and joins the history when the step ends. Taking a maximum twice
changes nothing, so forward passes that are recomputed count once.
"""

import torch
from torch import Tensor

from dsv3.model.layers import FixedDtype
from plugins.precision.quantiser import Quantiser, scale_of

KINDS = ("x", "w", "dy")


class TensorScales(FixedDtype):
    """Scales of one layer's x, w and dy. `history`: steps remembered; 0: the tensor's own amax."""

    precision_history: Tensor  # float32 [3, history], newest first
    precision_amax: Tensor  # float32 [3], of the step under way; zeros between steps

    def __init__(self, *, history: int) -> None:
        super().__init__()
        self.history = history
        if history:
            self.register_buffer("precision_history", torch.zeros(len(KINDS), history))
            self.register_buffer("precision_amax", torch.zeros(len(KINDS)), persistent=False)

    def end_step(self) -> None:
        if self.history:
            self.precision_history.copy_(self.precision_history.roll(1, dims=1))
            self.precision_history[:, 0] = self.precision_amax
            self.precision_amax.zero_()

    def forward(self, factor: str, quantiser: Quantiser, x: Tensor) -> Tensor:
        """The scale (a scalar) of x; NaN if x is not finite."""
        amax = x.abs().amax().float()
        if not self.history:
            return scale_of(amax, quantiser)
        kind = KINDS.index(factor.partition("_")[0])
        if self.training:
            self.precision_amax[kind] = torch.maximum(self.precision_amax[kind], amax.nan_to_num(posinf=0.0))
        past = self.precision_history[kind].amax()
        return scale_of(torch.where(past > 0, past, amax), quantiser) + 0 * amax
