"""SwiGLU that keeps its inputs in FP8 for the backward pass, and its output not at all.

    y = silu(g) u w        dg = c u s (1 + g (1 - s)),  du = c g s,  dw = sum over the row of dy g s u

with s = sigmoid(g), row weights w (the experts' gates; 1 if there are none) and c = dy w. Forward, y comes from g and u
as they are; backward, from what their codes stand for, in FP32. The layer that takes y next finds the codes with it
(`set_origin`), keeps those, and computes y again when it needs it for its weight's gradient.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from plugins.precision.plain import swiglu
from plugins.precision.quantised_linear import Origin, set_origin
from plugins.precision.quantiser import Held, Quantiser, run


class _HeldSwiGLU(torch.autograd.Function):
    """(y, codes, scales). Gates and up-projections are quantised as rows of their own: no tile spans both."""

    @staticmethod
    def forward(
        ctx: Any, gate_up: Tensor, row_weights: Tensor | None, quantiser: Quantiser
    ) -> tuple[Tensor, Tensor, Tensor]:
        held = quantiser.held(gate_up.reshape(-1, gate_up.shape[-1] // 2))
        ctx.save_for_backward(row_weights, *held)
        ctx.quantiser = quantiser
        ctx.mark_non_differentiable(*held)
        return swiglu(gate_up, row_weights), *held

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        row_weights, *held = ctx.saved_tensors
        dy = grads[0]
        gate_up = decoded(ctx.quantiser, Held(*held), dy.shape)
        return *run(gradients, dy, gate_up, row_weights, compiled=ctx.quantiser.compiled), None


def decoded(quantiser: Quantiser, held: Held, shape: tuple[int, ...]) -> Tensor:
    """[g ; u] in FP32, of y with `shape` [..., I]."""
    *rows, width = shape
    return quantiser.decoded(held, (2 * math.prod(rows), width), torch.float32).reshape(*rows, 2 * width)


def gradients(dy: Tensor, gate_up: Tensor, row_weights: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """[dg ; du] in the dtype of dy, and dw."""
    gate, up = gate_up.chunk(2, dim=-1)
    s, c, d_weights = gate.sigmoid(), dy.float(), None
    if row_weights is not None:
        d_weights = (c * gate * s * up).sum(-1).to(row_weights.dtype)
        c = c * row_weights.unsqueeze(-1)
    return torch.cat((c * up * s * (1 + gate * (1 - s)), c * gate * s), -1).to(dy.dtype), d_weights


def held_swiglu(gate_up: Tensor, row_weights: Tensor | None, quantiser: Quantiser) -> Tensor:
    """silu(gate) * up of gate_up [..., 2 I], gates first, times row weights [...]."""
    y, codes, scales = _HeldSwiGLU.apply(gate_up, row_weights, quantiser)
    shape, dtype = y.shape, y.dtype  # what follows must not hold y itself

    def restore(row_weights: Tensor | None, codes: Tensor, scales: Tensor) -> Tensor:
        y = run(swiglu, decoded(quantiser, Held(codes, scales), shape), row_weights, compiled=quantiser.compiled)
        return y.to(dtype).flatten(0, -2)

    set_origin(y, Origin((row_weights, codes, scales), restore))
    return y
