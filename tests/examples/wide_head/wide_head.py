"""A precision of one's own: BF16 everywhere but in the output head, which computes in FP32.

It stands outside the project and is named by `_target_` in conf/precision/wide_head.yaml.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.contracts import GroupedMM, Role


class CastLinear(nn.Module):
    """y = x W^T in `dtype`; the cast is part of the graph, so the FP32 weight gets an FP32 gradient."""

    def __init__(self, in_features: int, out_features: int, *, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.dtype), self.weight.to(self.dtype))


class CastGroupedLinear(nn.Module):
    """The same for each of E experts, by the product that the experts plugin gives."""

    def __init__(
        self, n_groups: int, in_features: int, out_features: int, *, dtype: torch.dtype, grouped_mm: GroupedMM
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_groups, out_features, in_features))
        self.dtype = dtype
        self.grouped_mm = grouped_mm

    def forward(self, x_MK: Tensor, counts_E: Tensor) -> Tensor:
        return self.grouped_mm(x_MK.to(self.dtype), self.weight.to(self.dtype), counts_E)


class WideHead:
    """`body` is the format of every product but the head's: bfloat16 or float32."""

    def __init__(self, *, body: str) -> None:
        if body not in ("bfloat16", "float32"):
            raise ValueError(f"precision.body={body}: bfloat16 or float32")
        self.activation_dtype: torch.dtype = getattr(torch, body)

    def linear(self, in_features: int, out_features: int, *, role: Role) -> nn.Module:
        return CastLinear(in_features, out_features, dtype=torch.float32 if role == "head" else self.activation_dtype)

    def grouped_linear(
        self, n_groups: int, in_features: int, out_features: int, *, role: Role, grouped_mm: GroupedMM
    ) -> nn.Module:
        return CastGroupedLinear(
            n_groups, in_features, out_features, dtype=self.activation_dtype, grouped_mm=grouped_mm
        )

    def swiglu(self, gate_up: Tensor, row_weights: Tensor | None = None) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        h = F.silu(gate) * up
        return h if row_weights is None else h * row_weights.unsqueeze(-1).to(h.dtype)

    def check(self, device: torch.device) -> list[str]:
        return []
