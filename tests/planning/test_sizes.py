"""Closed forms against models built whole on the meta device, and against the published sizes."""

from itertools import product
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from dsv3.model.decoder import Decoder
from dsv3.model.parameters import count_parameters
from dsv3.planning.sizes import Count, parameters
from dsv3.planning.skeleton import Skeleton, read_skeleton
from tests.planning.models import CONF, PRESETS, built_on_meta, config, on_meta, skeleton

GOLDEN = {  # total, active; computed from the published configs
    "v3_671b": (671_026_419_200, 37_552_282_624),
    "v2": (235_741_434_880, 21_375_800_320),
    "v2_lite": (15_706_484_224, 2_661_150_208),
    "deepseek_llm_7b": (6_910_365_696, 6_910_365_696),
    "deepseek_llm_67b": (67_425_001_472, 67_425_001_472),
}


def assert_equals_built(*overrides: str) -> None:
    assert_equal(skeleton(*overrides), on_meta(*overrides))


def assert_equal(skeleton: Skeleton, model: Decoder) -> None:
    planned, built = parameters(skeleton), count_parameters(model)
    assert planned["model"] == (built.total, built.active)
    assert planned["MTP"].total == built.mtp


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_equals_its_built_model(preset: str) -> None:
    assert_equals_built(f"model={preset}")


@pytest.mark.parametrize("preset", GOLDEN)
def test_golden_sizes(preset: str) -> None:
    assert parameters(skeleton(f"model={preset}"))["model"] == GOLDEN[preset]


def test_golden_size_of_mtp() -> None:
    assert parameters(skeleton("model=v3_671b"))["MTP"].total == 11_610_068_224


def test_components_of_671b_equal_their_modules() -> None:
    """Each component against the parameters of the modules that carry its name."""
    patterns = {
        "embedding": ("embed_tokens",),
        "attention": ("self_attn",),
        "dense FFN": ("mlp.gate_up_proj", "mlp.down_proj"),
        "router": ("mlp.router",),
        "shared experts": ("mlp.shared_experts",),
        "routed experts": ("mlp.experts",),
        "norms": ("input_layernorm", "post_attention_layernorm", "norm.weight"),
        "head": ("lm_head",),
    }
    named = [(n, p.numel()) for n, p in on_meta("model=v3_671b").named_parameters() if not n.startswith("mtp.")]
    owned = dict.fromkeys(patterns, 0)
    for parameter, numbers in named:
        if "self_attn" in parameter:
            owned["attention"] += numbers
        else:
            (owner,) = [c for c, parts in patterns.items() if any(part in f".{parameter}" for part in parts)]
            owned[owner] += numbers
    owned["router"] += 58 * 256  # selection biases
    planned = parameters(skeleton("model=v3_671b"))
    assert owned == {component: planned[component].total for component in patterns}


def options(kind: str) -> list[str]:
    return sorted(path.stem for path in (CONF / kind).glob("*.yaml"))


@pytest.mark.parametrize(("attention", "router"), product(options("attention"), options("router")))
def test_every_attention_and_router_equals_its_built_model(attention: str, router: str) -> None:
    assert_equals_built("model=tiny", f"attention={attention}", f"router={router}")


@pytest.mark.parametrize("memory", options("memory"))
def test_every_memory_equals_its_built_model(memory: str) -> None:
    assert_equals_built("model=tiny", f"memory={memory}")


@pytest.mark.parametrize(("balancing", "mtp"), product(options("balancing"), options("mtp")))
def test_every_balancing_and_mtp_equals_its_built_model(balancing: str, mtp: str) -> None:
    assert_equals_built("model=tiny", f"balancing={balancing}", f"mtp={mtp}")


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    n_layers = draw(st.integers(1, 4))
    groups = draw(st.sampled_from([1, 2, 4]))
    return {
        "vocab_size": draw(st.integers(4096, 5000)),
        "dim": 8 * draw(st.integers(1, 12)),
        "n_layers": n_layers,
        "n_dense_layers": draw(st.integers(0, n_layers)),
        "inter_dim": draw(st.integers(1, 99)),
        "moe_inter_dim": 8 * draw(st.integers(1, 9)),
        "n_routed_experts": groups * draw(st.integers(4, 9)),
        "n_shared_experts": draw(st.integers(0, 2)),
        "top_k": draw(st.integers(1, 4)),
        "n_groups": groups,
        "topk_groups": draw(st.integers(1, groups)),
        "q_lora_rank": draw(st.sampled_from([None, 24])),
        "kv_lora_rank": draw(st.integers(1, 40)),
        "tie_embeddings": draw(st.booleans()),
    }


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(["mla", "gqa"]), shapes(), st.integers(1, 3))
def test_random_shapes_equal_their_built_models(attention: str, model: dict[str, Any], depth: int) -> None:
    base = config("model=tiny", f"attention={attention}")
    changed = cast(DictConfig, OmegaConf.merge(base, {"model": model, "mtp": {"depth": depth}}))
    assert_equal(read_skeleton(changed), built_on_meta(changed))


def test_active_mtp_is_all_but_the_idle_experts() -> None:
    idle = 3 * 7168 * 2048 * (256 - 8) + 256  # and the selection biases
    assert parameters(skeleton("model=v3_671b"))["MTP"] == Count(11_610_068_224, 11_610_068_224 - idle)
