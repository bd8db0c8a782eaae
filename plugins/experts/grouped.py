"""Routed experts as two grouped GEMMs: gate and up together, then down."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.bounds import PositiveInt
from dsv3.contracts import Precision
from dsv3.model.layers import on_host

GROUPED_MM_ALIGNMENT = 16  # bytes; of every row that torch's kernel reads


def grouped_mm(x_MK: Tensor, weight_ENK: Tensor, counts_E: Tensor) -> Tensor:
    """torch's grouped product; falls back on a loop for FP64, which the kernel lacks (oracles use it)."""
    if len(x_MK) <= len(weight_ENK) and not torch.is_grad_enabled() and x_MK.device.type == "cpu":
        return few_rows_mm(x_MK, weight_ENK, counts_E)
    if x_MK.dtype == torch.float64:
        return loop_mm(x_MK, weight_ENK, counts_E)
    ends_E = counts_E.cumsum(0).to(torch.int32)
    return F.grouped_mm(x_MK, weight_ENK.transpose(-2, -1), offs=ends_E)


def few_rows_mm(x_MK: Tensor, weight_ENK: Tensor, counts_E: Tensor) -> Tensor:
    """For decoding: each row times a copy of its expert's matrix, where a CPU's kernel visits idle ones too."""
    experts_M = torch.arange(len(counts_E), device=counts_E.device).repeat_interleave(counts_E, output_size=len(x_MK))
    return torch.bmm(x_MK.unsqueeze(1), weight_ENK.index_select(0, experts_M).mT).squeeze(1)


def loop_mm(x_MK: Tensor, weight_ENK: Tensor, counts_E: Tensor) -> Tensor:
    """The reference: one product an expert."""
    parts = x_MK.split(on_host(counts_E))
    return torch.cat([x @ weight.mT for x, weight in zip(parts, weight_ENK.unbind(0), strict=True)])


class GroupedExperts(nn.Module):
    """E experts FFN_e(x) = W_down,e (g * silu(W_gate,e x) * W_up,e x) (eq. 12; g a row's gate), for all rows at once.

    `gate_up_proj.weight` is [E, 2 * inter_dim, D], gates first; `down_proj.weight` is [E, D, inter_dim].
    """

    product = staticmethod(grouped_mm)
    multiple = GROUPED_MM_ALIGNMENT // 2  # of both sizes, for rows in BF16

    def __init__(
        self, *, dim: PositiveInt, inter_dim: PositiveInt, n_experts: PositiveInt, precision: Precision
    ) -> None:
        super().__init__()
        for name, size in (("dim", dim), ("inter_dim", inter_dim)):
            if size % self.multiple:
                raise ValueError(f"experts.{name}={size}: must be a multiple of {self.multiple} for the grouped GEMM")
        self.gate_up_proj = precision.grouped_linear(
            n_experts, dim, 2 * inter_dim, role="expert_gate_up", grouped_mm=self.product
        )
        self.down_proj = precision.grouped_linear(
            n_experts, inter_dim, dim, role="expert_down", grouped_mm=self.product
        )
        self.joined = {"gate_up_proj.weight": (inter_dim, inter_dim)}
        self.swiglu = precision.swiglu

    def forward(self, x_MD: Tensor, counts_E: Tensor, gates_M: Tensor) -> Tensor:
        return self.down_proj(self.swiglu(self.gate_up_proj(x_MD, counts_E), gates_M), counts_E)


class LoopExperts(GroupedExperts):
    """The same experts, one product each: the readable reference, and for formats and sizes the kernel lacks."""

    product = staticmethod(loop_mm)
    multiple = 1
