"""Every preset, built on the meta device, has its published size; so does the closed form of its shapes."""

import math

import pytest
from omegaconf import DictConfig

from dsv3.model.parameters import ParameterCount, count_parameters
from tests.planning.models import PRESETS, config, on_meta

GOLDEN = {
    "v3_671b": ParameterCount(671_026_419_200, 37_552_282_624, 11_610_068_224),
    "v2": ParameterCount(235_741_434_880, 21_375_800_320, 0),
    "v2_lite": ParameterCount(15_706_484_224, 2_661_150_208, 0),
    "deepseek_llm_67b": ParameterCount(67_425_001_472, 67_425_001_472, 0),
    "deepseek_llm_7b": ParameterCount(6_910_365_696, 6_910_365_696, 0),
}
WHOLE_V3_CHECKPOINT = 684_489_845_504
"""With the embedding and the head that the published MTP layer repeats."""

PARTS = {  # attention, router, balancing, mtp of the whole model that the preset's name stands for
    "v3_671b": ("MultiHeadLatentAttention", "SigmoidGroupLimitedRouter", "Composed", "DeepSeekMTP"),
    "v2": ("MultiHeadLatentAttention", "SoftmaxRouter", "SequenceAux", "NoMTP"),
    "v2_lite": ("MultiHeadLatentAttention", "SoftmaxRouter", "SequenceAux", "NoMTP"),
    "deepseek_llm_67b": ("GroupedQueryAttention", None, None, "NoMTP"),
    "deepseek_llm_7b": ("GroupedQueryAttention", None, None, "NoMTP"),
}


def closed_form(c: DictConfig) -> ParameterCount:
    """Sizes from the shapes alone."""
    s, d = c.model, c.model.dim
    if "kv_lora_rank" in c.attention:
        qk, v = s.qk_nope_head_dim + s.qk_rope_head_dim, s.v_head_dim
        q = d * s.q_lora_rank + s.q_lora_rank + s.q_lora_rank * s.n_heads * qk if s.q_lora_rank else d * s.n_heads * qk
        kv = d * (s.kv_lora_rank + s.qk_rope_head_dim) + s.kv_lora_rank
        attention = q + kv + s.kv_lora_rank * s.n_heads * (s.qk_nope_head_dim + v) + s.n_heads * v * d
    else:
        attention = 2 * d * s.head_dim * (s.n_heads + s.n_kv_heads)
    dense, expert = 3 * d * s.inter_dim, 3 * d * s.moe_inter_dim
    learned = "dim" in c.router
    moe_rest = s.n_shared_experts * expert + s.n_routed_experts * d * learned
    bias = s.n_routed_experts if c.balancing._target_.endswith(("Composed", "LossFree")) else 0
    moe_layers = s.n_layers - s.n_dense_layers
    shared = s.vocab_size * d * (1 if s.tie_embeddings else 2) + d
    common = shared + s.n_layers * (attention + 2 * d) + s.n_dense_layers * dense + moe_layers * moe_rest
    total = common + moe_layers * (s.n_routed_experts * expert + bias)
    active = common + moe_layers * s.top_k * expert
    module = 2 * d * d + 3 * d + attention + 2 * d + moe_rest + s.n_routed_experts * expert + bias
    return ParameterCount(total, active, c.mtp.get("depth", 0) * module)


@pytest.mark.parametrize("preset", GOLDEN)
def test_published_sizes(preset):
    assert count_parameters(on_meta(f"model={preset}")) == GOLDEN[preset]


@pytest.mark.parametrize("preset", GOLDEN)
def test_the_closed_form_gives_the_published_sizes(preset):
    assert closed_form(config(f"model={preset}")) == GOLDEN[preset]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("options", [(), ("attention=gqa",), ("attention=mla",), ("balancing=none", "mtp=none")])
def test_built_equals_closed_form(preset, options):
    overrides = (f"model={preset}", *options)
    assert count_parameters(on_meta(*overrides)) == closed_form(config(*overrides))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("router", ["hash", "random", "softmax"])
def test_other_parts_equal_the_closed_form(router, tied):
    overrides = ("model=tiny", f"router={router}", "mtp.depth=2", f"model.tie_embeddings={str(tied).lower()}")
    assert count_parameters(on_meta(*overrides)) == closed_form(config(*overrides))


def test_all_dense_without_experts():
    overrides = ("model=deepseek_llm_7b", "attention=mla")
    assert config(*overrides).model.n_routed_experts == 0
    count = count_parameters(on_meta(*overrides))
    assert count.total == count.active


def test_the_whole_v3_checkpoint():
    shapes = config("model=v3_671b").model
    golden = GOLDEN["v3_671b"]
    assert golden.total + golden.mtp + 2 * shapes.vocab_size * shapes.dim == WHOLE_V3_CHECKPOINT


@pytest.mark.parametrize("preset", PARTS)
def test_a_preset_is_a_whole_model(preset):
    model = on_meta(f"model={preset}")
    attention, router, balancing, mtp = PARTS[preset]
    assert {type(layer.self_attn).__name__ for layer in model.layers} == {attention}
    assert {type(moe.router).__name__ for _, moe in model.moe_layers()} == ({router} if router else set())
    assert {type(moe.balancing).__name__ for _, moe in model.moe_layers()} == ({balancing} if balancing else set())
    assert type(model.mtp).__name__ == mtp


def test_parts_of_a_preset_are_still_swapped_by_one_key():
    model = on_meta("model=v2_lite", "attention=gqa", "router=sigmoid_group_limited", "balancing=v3", "mtp=deepseek")
    assert type(model.layers[0].self_attn).__name__ == "GroupedQueryAttention"
    router = next(model.moe_layers())[1].router
    assert type(router).__name__ == "SigmoidGroupLimitedRouter"
    assert model.mtp.depth == 1


def test_figures_of_the_report():
    """70,272 bytes of latent cache a token over 61 layers in BF16; YaRN off."""
    model = on_meta("model=v3_671b")
    caches = [layer.self_attn.kv_cache_elements_per_token() for layer in model.layers]
    assert 2 * sum(caches) == 70_272
    assert math.isclose(model.attention(0).scale, 192**-0.5)


def test_building_671b_takes_no_weights():
    model = on_meta("model=v3_671b")
    assert all(p.is_meta for p in model.parameters())
    assert all(b.is_meta for b in model.buffers())


@pytest.mark.parametrize("preset", [*GOLDEN, "small"])
def test_init_is_the_reports(preset):
    expected = 0.02 if preset == "small" else 0.006
    assert config(f"model={preset}").model.init_std == expected
