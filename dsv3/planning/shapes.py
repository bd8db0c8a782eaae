"""Shapes of a model at another width, by one rule.

With k the new width over the preset's:

    layers                   L k, rounded; at least one more than the dense ones     (width per layer is kept)
    heads, key-value heads   H k, rounded; at least 1                                (width of a head is kept)
    FFN, expert, ranks       times k, rounded to a multiple of 8                     (proportions are kept)
    experts, top-k, groups, dense layers, vocabulary                                 as they are

Halves are rounded up. Where heads and key-value heads no longer divide, key-value heads are the nearest divisor below.
"""

from math import floor
from typing import Any

from omegaconf import DictConfig

MULTIPLE = 8
"""Of FFN widths and ranks: what FP8 layers and tiles of a GEMM ask for."""
WIDTHS = ("inter_dim", "moe_inter_dim", "q_lora_rank", "kv_lora_rank")


def scaled_shapes(model: DictConfig, width: int) -> dict[str, int]:
    """Keys of `model` and their values where `model.dim` is `width`.

    Raises:
        ValueError: the width is not positive.
    """
    if width <= 0:
        raise ValueError(f"width {width}: must be positive")
    k = width / model.dim
    heads = max(1, _rounded(model.n_heads * k))
    key_value = min(heads, max(1, _rounded(model.n_kv_heads * k)))
    shapes: dict[str, Any] = {
        "dim": width,
        "n_layers": max(model.n_dense_layers + 1, _rounded(model.n_layers * k)),
        "n_heads": heads,
        "n_kv_heads": max(n for n in range(1, key_value + 1) if heads % n == 0),
    }
    for name in WIDTHS:
        if model.get(name):  # null: the model has no such matrix
            shapes[name] = max(MULTIPLE, MULTIPLE * _rounded(model[name] * k / MULTIPLE))
    return shapes


def _rounded(value: float) -> int:
    return floor(value + 0.5)
