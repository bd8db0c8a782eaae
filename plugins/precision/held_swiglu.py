"""SwiGLU that keeps its inputs in FP8 for the backward pass, and its output not at all.

    y = silu(g) * u          dg = dy u s (1 + g (1 - s)),  du = dy g s,  s = sigmoid(g)

Forward, y comes from g and u as they are; backward, from what their codes stand for. The layer that takes y next finds
the codes with it (`set_origin`) and computes y again when it needs it for its weight's gradient.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from plugins.precision.quantised_linear import Origin, set_origin
from plugins.precision.quantiser import Held, Quantiser, run


class _HeldSwiGLU(torch.autograd.Function):
    """(y, codes, scales). Gates and up-projections are quantised as rows of their own: no tile spans both."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, quantiser: Quantiser) -> tuple[Tensor, Tensor, Tensor]:
        held = quantiser.held(gate_up.reshape(-1, gate_up.shape[-1] // 2))
        ctx.save_for_backward(*held)
        ctx.quantiser = quantiser
        ctx.mark_non_differentiable(*held)
        return swiglu(gate_up), *held

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        dy = grads[0]
        gate_up = ctx.quantiser.decoded(Held(*ctx.saved_tensors), halves(dy), torch.float32)
        gate_up = gate_up.reshape(*dy.shape[:-1], -1)
        return run(gradient, dy, gate_up, compiled=ctx.quantiser.compiled), None


def halves(y: Tensor) -> tuple[int, int]:
    """The shape in which the inputs of y [..., I] are quantised."""
    return 2 * y.numel() // y.shape[-1], y.shape[-1]


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gradient(dy: Tensor, gate_up: Tensor) -> Tensor:
    """d(gate_up) in the dtype of dy, computed in that of gate_up."""
    gate, up = gate_up.chunk(2, dim=-1)
    s = gate.sigmoid()
    d_gate, d_up = dy * up * s * (1 + gate * (1 - s)), dy * gate * s
    return torch.cat((d_gate, d_up), -1).to(dy.dtype)


def held_swiglu(gate_up: Tensor, quantiser: Quantiser) -> Tensor:
    """silu(gate) * up of gate_up [..., 2 I], gates first."""
    y, codes, scales = _HeldSwiGLU.apply(gate_up, quantiser)
    shape, dtype = halves(y), y.dtype  # what follows must not hold y itself

    def restore(held: Held) -> Tensor:
        inputs = quantiser.decoded(held, shape, torch.float32)
        return swiglu(inputs.reshape(-1, 2 * shape[1])).to(dtype)

    set_origin(y, Origin(Held(codes, scales), restore))
    return y
