"""The simplest precision, for building other plugins in their checks; and comparisons up to rounding."""

from typing import Any

import torch
from torch import Tensor, nn

from dsv3.contracts import GroupedMM, Role


class Plain:
    """Every product in one format, FP32 master weights. `roles` lists what was asked for."""

    def __init__(self, activation_dtype: torch.dtype) -> None:
        self.activation_dtype = activation_dtype
        self.roles: list[Role] = []

    def linear(self, in_features: int, out_features: int, *, role: Role) -> nn.Module:
        self.roles.append(role)
        return _Linear((out_features, in_features), self.activation_dtype)

    def grouped_linear(
        self, n_groups: int, in_features: int, out_features: int, *, role: Role, grouped_mm: GroupedMM
    ) -> nn.Module:
        self.roles.append(role)
        return _GroupedLinear((n_groups, out_features, in_features), self.activation_dtype)

    def swiglu(self, gate_up: Tensor, row_weights: Tensor | None = None) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        h = nn.functional.silu(gate) * up
        return h if row_weights is None else h * row_weights.unsqueeze(-1).to(h.dtype)

    def check(self, device: torch.device) -> list[str]:
        return []


class _Linear(nn.Module):
    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.dtype = dtype

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x.to(self.dtype), self.weight.to(self.dtype))


class _GroupedLinear(_Linear):
    def forward(self, x_MK: Tensor, counts_E: Tensor) -> Tensor:  # type: ignore[override]
        return loop_mm(x_MK.to(self.dtype), self.weight.to(self.dtype), counts_E)


def loop_mm(x_MK: Tensor, weight_ENK: Tensor, counts_E: Tensor) -> Tensor:
    """One product a group."""
    parts = x_MK.split(counts_E.tolist())
    return torch.cat([x @ weight.mT for x, weight in zip(parts, weight_ENK.unbind(0), strict=True)])


def drawn(module: Any) -> Any:
    """The module with its matrices drawn, as the core draws them; at a size that keeps a vector's length."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
    return module


def error(found: Tensor, expected: Tensor) -> float:
    """|a - b| / |b| in the Euclidean norm, in FP64; 0 where both are zero."""
    difference = (found.detach().double() - expected.detach().double()).norm()
    return float(difference / expected.detach().double().norm()) if difference else 0.0
