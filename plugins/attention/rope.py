"""Rotary position embedding (arXiv 2104.09864), with YaRN.

Pair j of a vector of width R turns by the angle p * theta^(-2j/R) at position p:
    (a, b) -> (a cos - b sin, a sin + b cos).
Which two numbers are a pair is a convention of the weights: neighbours (x_2j, x_2j+1) in DeepSeek-V2's and V3's
(`rotate`), halves (x_j, x_j+R/2) in those laid out like LLaMA's (`rotate_halves`).

YaRN (arXiv 2309.00071) stretches slow pairs by `factor` and leaves fast ones: a pair that makes more than
`beta_fast` turns over the original length keeps its frequency, one that makes fewer than `beta_slow` is divided
by `factor`, with a linear ramp between. The softmax scale is multiplied by (0.1 * mscale * ln(factor) + 1)^2.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

YARN_KEYS = {"factor", "original_length", "beta_fast", "beta_slow", "mscale"}


def inverse_frequencies(dim: int, theta: float, yarn: Mapping[str, Any] | None) -> Tensor:
    """Angles per position, float32 [dim / 2], on the CPU; `dim` is the rotated width R."""
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=torch.float64, device="cpu") / dim)
    if yarn is None:
        return frequencies.float()
    if set(yarn) != YARN_KEYS:
        raise ValueError(f"model.yarn={dict(yarn)}: must have the keys {sorted(YARN_KEYS)}")
    low, high = ramp(dim, theta, yarn)
    kept = 1 - ((torch.arange(dim // 2, dtype=torch.float64, device="cpu") - low) / max(high - low, 1e-3)).clamp(0, 1)
    return (frequencies * (kept + (1 - kept) / yarn["factor"])).float()


class Frequencies:
    """`inverse_frequencies` on any device, copied to each once: no part of a model's state, so that no cast, checkpoint
    or fresh allocation of its tensors changes them."""

    def __init__(self, dim: int, theta: float, yarn: Mapping[str, Any] | None) -> None:
        self._by_device = {torch.device("cpu"): inverse_frequencies(dim, theta, yarn)}

    def on(self, device: torch.device) -> Tensor:
        """Float32 [dim / 2]."""
        if device not in self._by_device:
            with torch.inference_mode(False):  # text may come first, and training save them for its backward pass
                self._by_device[device] = self._by_device[torch.device("cpu")].to(device)
        return self._by_device[device]


def ramp(dim: int, theta: float, yarn: Mapping[str, Any]) -> tuple[int, int]:
    """First and last pair of YaRN's ramp: where a pair makes beta_fast and beta_slow turns over the original length."""

    def pair(turns: float) -> float:
        return dim * math.log(yarn["original_length"] / (turns * 2 * math.pi)) / (2 * math.log(theta))

    return max(math.floor(pair(yarn["beta_fast"])), 0), min(math.ceil(pair(yarn["beta_slow"])), dim - 1)


def softmax_factor(yarn: Mapping[str, Any] | None) -> float:
    """What the softmax scale is multiplied by: 1 without YaRN, (0.1 * mscale * ln(factor) + 1)^2 with it."""
    if yarn is None or yarn["factor"] <= 1:
        return 1.0
    return (0.1 * yarn["mscale"] * math.log(yarn["factor"]) + 1.0) ** 2


def cos_sin(positions_BT: Tensor, frequencies_R2: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of every position's angles, float32 [B, T, 1, R/2] (to broadcast over heads)."""
    angles = positions_BT[..., None, None].float() * frequencies_R2.float()
    return angles.cos(), angles.sin()


def rotate(x_BTHR: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn neighbours; computed in FP32 (FP64 stays), returned in x's dtype."""
    dtype = torch.promote_types(x_BTHR.dtype, torch.float32)
    even, odd = x_BTHR.to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2).to(x_BTHR.dtype)


def rotate_halves(x_BTHR: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn number j of the first half with number j of the second; in FP32 (FP64 stays), returned in x's dtype."""
    dtype = torch.promote_types(x_BTHR.dtype, torch.float32)
    first, second = x_BTHR.to(dtype).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1).to(x_BTHR.dtype)
