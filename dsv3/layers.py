"""Layers that both the core and plugins build on: RMSNorm and SwiGLU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.contracts import Precision


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x^2) + eps) * weight over the last axis, in FP32 (FP64 stays), returned in x's dtype."""

    def __init__(self, dim: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(dtype), self.weight.shape, self.weight.to(dtype), self.eps).to(x.dtype)


class SwiGLU(nn.Module):
    """FFN(x) = W_down (silu(W_gate x) * W_up x); `gate_up_proj.weight` is [2 * inter_dim, D], gates first."""

    def __init__(self, *, dim: int, inter_dim: int, precision: Precision) -> None:
        super().__init__()
        self.gate_up_proj = precision.linear(dim, 2 * inter_dim, role="ffn_gate_up")
        self.down_proj = precision.linear(inter_dim, dim, role="ffn_down")

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)
