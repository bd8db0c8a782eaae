"""Unquantised precisions: every matmul in one format, FP32 master weights.

BF16: weights and inputs are cast to BF16 for each product (accumulated in FP32 inside it); the cast of a
weight is part of the graph, so that its gradient arrives, and is accumulated over micro-batches, in FP32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.contracts import GroupedMM, Role
from dsv3.model.layers import local
from dsv3.model.recompute import recomputed


class CastWeight(nn.Module):
    """A layer whose FP32 `weight` is used in `dtype`."""

    def __init__(self, *shape: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.dtype = dtype
        self.held: Tensor | None = None

    def hold_weights(self, hold: bool) -> bool:
        """Whether that changed anything."""
        if hold == (self.held is not None) or self.weight.dtype == self.dtype:
            return False
        self.held = self.weight.to(self.dtype) if hold else None  # a cast keeps nothing: its gradient may come in parts
        return True

    def cast_weight(self) -> Tensor:
        return local(self.weight).to(self.dtype) if self.held is None else self.held


class CastLinear(CastWeight):
    """y = x W^T with both factors in `dtype`; `weight` is FP32 [out, in]."""

    def __init__(self, in_features: int, out_features: int, *, dtype: torch.dtype) -> None:
        super().__init__(out_features, in_features, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.dtype), self.cast_weight())


class CastGroupedLinear(CastWeight):
    """`CastLinear` for each of E groups of rows; `weight` is FP32 [E, out, in]."""

    def __init__(
        self, n_groups: int, in_features: int, out_features: int, *, dtype: torch.dtype, grouped_mm: GroupedMM
    ) -> None:
        super().__init__(n_groups, out_features, in_features, dtype=dtype)
        self.grouped_mm = grouped_mm

    def forward(self, x_MK: Tensor, counts_E: Tensor) -> Tensor:
        return self.grouped_mm(x_MK.to(self.dtype), self.cast_weight(), counts_E)


def swiglu(gate_up: Tensor, row_weights: Tensor | None) -> Tensor:
    """silu(a) * b * w, [..., I], of `gate_up` = [a ; b] and row weights w [...]; in place, so not for autograd."""
    gate, up = gate_up.chunk(2, dim=-1)
    h = F.silu(gate).mul_(up)
    return h if row_weights is None else h.mul_(row_weights.unsqueeze(-1).to(h.dtype))


class _SwiGLU(torch.autograd.Function):
    """h = `swiglu` with its gradient, for which only the arguments are kept. With c = dh * w,

    da = c * b * silu'(a)        db = c * silu(a)        dw = sum over the row of dh * silu(a) * b
    """

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor, row_weights: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up, row_weights)
        return swiglu(gate_up, row_weights)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None]:
        gate_up, row_weights = ctx.saved_tensors
        gate, up = gate_up.chunk(2, dim=-1)
        activated, dh = F.silu(gate), grads[0]
        weights_grad = None
        if row_weights is not None:
            weights_grad = (activated * up).mul_(dh).sum(-1, dtype=row_weights.dtype)
            dh = dh * row_weights.unsqueeze(-1).to(dh.dtype)
        grad = torch.empty_like(gate_up)
        gate_grad, up_grad = grad.chunk(2, dim=-1)
        torch.ops.aten.silu_backward.grad_input(dh * up, gate, grad_input=gate_grad)
        torch.mul(dh, activated, out=up_grad)
        return grad, weights_grad


class OneFormat:
    """A precision in which every role computes in `activation_dtype`."""

    activation_dtype: torch.dtype

    def linear(self, in_features: int, out_features: int, *, role: Role) -> nn.Module:
        return CastLinear(in_features, out_features, dtype=self.activation_dtype)

    def grouped_linear(
        self, n_groups: int, in_features: int, out_features: int, *, role: Role, grouped_mm: GroupedMM
    ) -> nn.Module:
        return CastGroupedLinear(
            n_groups, in_features, out_features, dtype=self.activation_dtype, grouped_mm=grouped_mm
        )

    def swiglu(self, gate_up: Tensor, row_weights: Tensor | None = None) -> Tensor:
        if not torch.is_grad_enabled():  # decoding: an autograd function costs more than so small an operation
            return swiglu(gate_up, row_weights)
        activated: Tensor = recomputed("swiglu", _SwiGLU.apply, gate_up, row_weights)
        return activated

    def check(self, device: torch.device) -> list[str]:
        return []


class FP32(OneFormat):
    activation_dtype = torch.float32


class BF16(OneFormat):
    activation_dtype = torch.bfloat16
