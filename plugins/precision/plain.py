"""Precisions that need no quantiser: every product in one format, FP32 master weights.

BF16: weights and inputs are cast to BF16 for each product (accumulated in FP32 inside it); the cast of a
weight is part of the graph, so that its gradient arrives, and is accumulated over micro-batches, in FP32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.contracts import GroupedMM, Role


class CastWeight(nn.Module):
    """A layer whose FP32 `weight` is used in `dtype`."""

    def __init__(self, *shape: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.dtype = dtype
        self.held: Tensor | None = None

    def hold_weights(self, held: bool) -> None:
        self.held = self.weight.detach().to(self.dtype) if held else None

    def cast_weight(self) -> Tensor:
        return self.weight.to(self.dtype) if self.held is None else self.held


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

    def swiglu(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate) * up

    def check(self, device: torch.device) -> list[str]:
        return []


class FP32(OneFormat):
    activation_dtype = torch.float32


class BF16(OneFormat):
    activation_dtype = torch.bfloat16
