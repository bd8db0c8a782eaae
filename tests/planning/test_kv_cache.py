"""Cache figures against the caches that the plugins really make."""

import pytest
import torch

from dsv3.build import build_model
from dsv3.model.layers import CACHE_BLOCK
from dsv3.planning.kv_cache import cache_bytes
from tests.planning.models import PRESETS, config, skeleton


def test_671b_keeps_576_numbers_a_layer_for_40960() -> None:
    s = skeleton("model=v3_671b")
    cache = cache_bytes(s.attention, s.layers, 2)
    assert cache == {
        "numbers_per_layer": 576,
        "bytes": 576 * 2 * 61,
        "expanded_numbers_per_layer": 128 * (192 + 128),
        "expanded_bytes": 40_960 * 2 * 61,
    }
    assert cache["bytes"] == 70_272


@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_bytes_equal_the_real_caches(attention: str) -> None:
    """All tensors of every layer's cache, in FP32, of rows that fill whole blocks."""
    overrides = ("model=tiny", "precision=fp32", f"attention={attention}")
    s, rows = skeleton(*overrides), 3
    model = build_model(config(*overrides)).eval()
    caches = model.new_caches(range(rows))
    with torch.no_grad():
        model.decode(torch.zeros(rows, CACHE_BLOCK, dtype=torch.int64), caches)
    held = sum(row.held.nbytes for cache in caches.layers for row in cache.rows.values())
    assert held == cache_bytes(s.attention, s.layers, 4)["bytes"] * rows * CACHE_BLOCK


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_expanded_gqa_is_multi_head_attention(kv_heads: int) -> None:
    shared = ("model=tiny", "attention=gqa", "model.n_heads=4")
    gqa = skeleton(*shared, f"model.n_kv_heads={kv_heads}").attention
    mha = skeleton(*shared, "model.n_kv_heads=4").attention
    assert cache_bytes(gqa, 1, 1)["expanded_numbers_per_layer"] == mha.cache_numbers


@pytest.mark.parametrize("preset", PRESETS)
def test_no_attention_keeps_more_than_full_heads(preset: str) -> None:
    s = skeleton(f"model={preset}")
    cache = cache_bytes(s.attention, s.layers, 2)
    assert cache["bytes"] <= cache["expanded_bytes"]
