"""Cache figures against the caches that the plugins really make."""

import pytest

from dsv3.build import build_model
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
    """All tensors of every layer's cache, in FP32."""
    overrides = ("model=tiny", "precision=fp32", f"attention={attention}")
    s, rows, capacity = skeleton(*overrides), 3, 5
    caches = build_model(config(*overrides)).new_caches(rows, capacity)
    held = sum(t.nbytes for cache in caches for t in vars(cache).values() if hasattr(t, "nbytes"))
    assert held == cache_bytes(s.attention, s.layers, 4)["bytes"] * rows * capacity


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
