"""config.json -> our configuration.

Only shapes and the options that make the model's function are read; training settings never are.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from dsv3.checkpoint.families import (
    EXPERT_KEYS,
    FAMILIES,
    LATENT_KEYS,
    LATENT_NORM_EPS,
    ROUTING_KEYS,
    V3_GROUP_SCORE_TOP,
    rope_gain,
)
from dsv3.config.moved import todays_value


class Choices(NamedTuple):
    """What a config.json asks of ours: options of conf/ (as overrides) and the shapes of `model`."""

    overrides: list[str]
    model: dict[str, Any]


def hf_to_choices(hf: Mapping[str, Any], *, mtp_layers: int) -> Choices:
    """Options and shapes of the model that a config.json describes, with so many MTP layers among its weights.

    Raises:
        ValueError: the model is none that our options build; the key and its value are in the message.
    """
    hf = Fields(hf)
    family = hf["model_type"]
    if family not in FAMILIES:
        raise ValueError(f"config.json: model_type={family}: must be one of {', '.join(FAMILIES)}")
    for key, value in FIXED[family].items():
        if key in hf and hf[key] != value:
            raise ValueError(f"config.json: {key}={hf[key]}, where only {value} can be imported")
    yarn = yarn_of(hf, family)
    model = {
        "vocab_size": hf.size("vocab_size"),
        "dim": hf.size("hidden_size"),
        "inter_dim": hf.size("intermediate_size"),
        "n_layers": hf.size("num_hidden_layers"),
        "n_heads": hf.size("num_attention_heads"),
        "norm_eps": hf["rms_norm_eps"],
        "rope_theta": float(rope_fields(hf).get("rope_theta", 10000.0)),
        "yarn": yarn,
        "tie_embeddings": hf.get("tie_word_embeddings", False),
    }
    read = read_llama if family == "llama" else read_deepseek
    options, shapes = read(hf, mtp_layers)
    kept = hf.get("dsv3", {})
    if decode := kept.get("attention", {}).get("decode"):
        options.append(f"attention.decode={todays_value('attention.decode', decode)}")
    return Choices(options, kept.get("model", {}) | model | shapes)


def read_llama(hf: "Fields", mtp_layers: int) -> tuple[list[str], dict[str, Any]]:
    heads = hf["num_attention_heads"]
    shapes = {
        "n_kv_heads": hf.get("num_key_value_heads") or heads,
        "head_dim": hf.get("head_dim") or hf["hidden_size"] // heads,
        "n_dense_layers": hf["num_hidden_layers"],
        "n_routed_experts": 0,
        "n_shared_experts": 0,
    }
    return ["attention=gqa", "balancing=none", "mtp=none"], shapes


def read_deepseek(hf: "Fields", mtp_layers: int) -> tuple[list[str], dict[str, Any]]:
    keys = LATENT_KEYS | EXPERT_KEYS | ROUTING_KEYS
    for name in keys:
        if not isinstance(hf[name], int | float | None):
            raise ValueError(f"config.json: {name}={hf[name]}: must be a number")
    shapes = {ours: hf[name] for name, ours in keys.items()}
    unset = {"n_shared_experts": 0, "n_groups": 1, "topk_groups": 1}
    shapes |= {key: value for key, value in unset.items() if shapes[key] is None}
    options = ["attention=mla", *routing_options(hf)]
    options += ["mtp=deepseek", f"mtp.depth={mtp_layers}"] if mtp_layers else ["mtp=none"]
    if hf["hidden_size"] % 8 or shapes["moe_inter_dim"] % 8:
        options.append("experts=loop")  # the grouped product wants multiples of 8
    return options, shapes


class Fields(dict[str, Any]):
    """A config.json, in which a key that is needed and missing is the user's mistake."""

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"config.json lacks {key}")

    def size(self, key: str) -> int:
        """A whole number above 0."""
        value = self[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"config.json: {key}={value}: must be a whole number above 0")
        return value


COMMON_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
LATENT_FIXED = COMMON_FIXED | {"rms_norm_eps": LATENT_NORM_EPS, "moe_layer_freq": 1}
FIXED: dict[str, dict[str, Any]] = {
    "deepseek_v3": LATENT_FIXED
    | {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "rope_interleave": True},
    "deepseek_v2": LATENT_FIXED | {"scoring_func": "softmax", "norm_topk_prob": False},
    "llama": COMMON_FIXED,
}
"""Keys of a config.json that have one value in every model of the family that our options build."""


def routing_options(hf: Fields) -> list[str]:
    if hf["model_type"] == "deepseek_v3":
        return ["router=sigmoid_group_limited", f"router.group_score_top={V3_GROUP_SCORE_TOP}", "balancing=v3"]
    methods = {"greedy": "softmax", "group_limited_greedy": "softmax_group_limited"}
    if hf["topk_method"] not in methods:
        raise ValueError(f"config.json: topk_method={hf['topk_method']}: must be one of {', '.join(methods)}")
    return [f"router={methods[hf['topk_method']]}", "balancing=sequence_aux"]


def rope_fields(hf: Mapping[str, Any]) -> dict[str, Any]:
    """RoPE's settings: transformers 5 writes one mapping, earlier ones and the published files two keys."""
    theta = {"rope_theta": hf["rope_theta"]} if "rope_theta" in hf else {}
    return theta | (hf.get("rope_scaling") or {}) | (hf.get("rope_parameters") or {})


def yarn_of(hf: Mapping[str, Any], family: str) -> dict[str, Any] | None:
    rope = rope_fields(hf)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ValueError(f"config.json: RoPE of type {kind} cannot be imported; default and yarn can")
    factor, mscale, all_dim = rope["factor"], rope.get("mscale"), rope.get("mscale_all_dim")
    gain = rope.get("attention_factor")
    if gain is None:
        ratio = rope_gain(factor, mscale) / rope_gain(factor, all_dim) if mscale and all_dim else None
        gain = rope_gain(factor, 1) if ratio is None else ratio
    if family == "llama":
        all_dim = 1.0 if factor <= 1 else round((gain - 1) / (0.1 * math.log(factor)), 9)
    elif not all_dim or not math.isclose(gain, 1.0):
        raise ValueError(
            f"config.json: YaRN with mscale={mscale}, mscale_all_dim={all_dim} scales cos and sin by {gain}; "
            f"only equal values, with which the softmax alone is scaled, can be imported for {family}"
        )
    if factor == 1:
        return None  # plain RoPE, as an export writes it
    return {
        "factor": factor,
        "original_length": rope["original_max_position_embeddings"],
        "beta_fast": rope.get("beta_fast") or 32,
        "beta_slow": rope.get("beta_slow") or 1,
        "mscale": all_dim,
    }
