"""SwiGLU that saves its inputs in FP8 and recomputes its output in the backward pass.

    y = silu(g) u w        dg = c u s (1 + g (1 - s)),  du = c g s,  dw = sum over the row of dy g s u

with s = sigmoid(g), row weights w (the experts' gates; 1 if there are none) and c = dy w. Forward, y comes from g and u
as they are; backward, from what their codes stand for, in FP32. The layer that takes y next keeps the same codes and
computes y again when it needs it for its weight's gradient. It is given y as any other tensor and asks autograd for
the function that made it (`origin_of`), which holds the codes: y changed, or a copy of it, has another origin.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from plugins.precision.plain import swiglu
from plugins.precision.quantiser import Held, Quantiser, run_kernel


class Origin(NamedTuple):
    """What a tensor can be computed from again in the backward pass, so that it need not be kept itself."""

    tensors: tuple[Tensor | None, ...]
    restore: Callable[..., Tensor]  # of the tensors


def origin_of(x: Tensor) -> Origin | None:
    """The codes that x was computed with, if it is what `held_swiglu` returned and a gradient is asked for."""
    made_by: Any = x.grad_fn
    restore = getattr(made_by, "restore_swiglu", None)
    return None if restore is None else Origin(made_by.saved_tensors, restore)


class _HeldSwiGLU(torch.autograd.Function):
    """Gates and up-projections are quantised as rows of their own: no tile spans both."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, row_weights: Tensor | None, quantiser: Quantiser) -> Tensor:
        ctx.save_for_backward(row_weights, *quantiser.held(gate_up.reshape(-1, gate_up.shape[-1] // 2)))
        y = swiglu(gate_up, row_weights)
        ctx.quantiser, ctx.restore_swiglu = quantiser, _restoring(quantiser, tuple(y.shape), y.dtype)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        row_weights, *held = ctx.saved_tensors
        dy = grads[0]
        gate_up = decoded(ctx.quantiser, Held(*held), dy.shape)
        return *run_kernel(gradients, dy, gate_up, row_weights, compiled=ctx.quantiser.compiled), None


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
    y: Tensor = _HeldSwiGLU.apply(gate_up, row_weights, quantiser)
    return y


def _restoring(quantiser: Quantiser, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[..., Tensor]:
    """What computes y, as a matrix, of row weights, codes and scales; it must not hold y itself."""

    def restore(row_weights: Tensor | None, codes: Tensor, scales: Tensor) -> Tensor:
        gate_up = decoded(quantiser, Held(codes, scales), shape)
        return run_kernel(swiglu, gate_up, row_weights, compiled=quantiser.compiled).to(dtype).flatten(0, -2)

    return restore
