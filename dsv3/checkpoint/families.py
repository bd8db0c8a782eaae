"""Which Hugging Face model a configuration is, and its config.json both ways.

    deepseek_v3     attention=mla   router=sigmoid_group_limited (or no experts)    MTP layers
    deepseek_v2     attention=mla   router=softmax or softmax_group_limited
    llama           attention=gqa   dense

Options are known by the `_target_` of their YAML files. What a family cannot represent is refused, all of it
together. What has no say in the model's function (widths that its attention does not use, how it decodes) goes into
a section `dsv3` of config.json, so that an import restores it. Training settings are in neither: no import reads any.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from dsv3.preflight.compose import CONF

LATENT_NORM_EPS = 1e-6
"""transformers' MLA has this epsilon in the norms of its latents, whatever the config says."""

V3_GROUP_SCORE_TOP = 2
"""Affinities that the published router sums for a group's score; no config key sets it."""


class Parts(NamedTuple):
    """The sections of a configuration that make the model's function, resolved."""

    model: dict[str, Any]
    attention: dict[str, Any]
    router: dict[str, Any]
    experts: dict[str, Any]
    mtp: dict[str, Any]

    @classmethod
    def of(cls, config: DictConfig) -> "Parts":
        sections: Any = OmegaConf.to_container(config, resolve=True)
        return cls(*(sections[name] for name in cls._fields))

    def is_option(self, kind: str, *options: str) -> bool:
        """Whether the section has the `_target_` of one of these files of conf/<kind>/."""
        return getattr(self, kind)["_target_"] in {target(kind, option) for option in options}

    @property
    def has_experts(self) -> bool:
        return self.model["n_dense_layers"] < self.model["n_layers"]

    @property
    def mtp_layers(self) -> int:
        return self.mtp.get("depth", 0)


class Choices(NamedTuple):
    """What a config.json asks of ours: options of conf/ (as overrides) and the shapes of `model`."""

    overrides: list[str]
    model: dict[str, Any]


def target(kind: str, option: str) -> str:
    return OmegaConf.load(CONF / kind / f"{option}.yaml")._target_


def config_to_hf(config: DictConfig, special_ids: Mapping[str, int], *, mtp: bool) -> dict[str, Any]:
    """config.json of the model that `config` describes, without dtype.

    special_ids: `bos_token_id` and the like, as far as the tokenizer has them. mtp: with the MTP layers.

    Raises:
        ValueError: no family has such a model; every reason is in the message.
    """
    parts = Parts.of(config)
    layers = parts.mtp_layers if mtp else 0
    problems = list(obstacles(parts, layers))
    if problems:
        raise ValueError("Hugging Face's format cannot hold this model: " + "; ".join(problems))
    family = family_of(parts)
    model = parts.model
    yarn = parts.attention["yarn"]
    length = config.data.sequence_length if yarn is None else int(yarn["factor"] * yarn["original_length"])
    fields = {
        "architectures": [FAMILIES[family]],
        "model_type": family,
        "vocab_size": model["vocab_size"],
        "hidden_size": model["dim"],
        "intermediate_size": model["inter_dim"],
        "num_hidden_layers": model["n_layers"],
        "num_attention_heads": parts.attention["n_heads"],
        "hidden_act": "silu",
        "rms_norm_eps": model["norm_eps"],
        "rope_theta": parts.attention["rope_theta"],
        "rope_scaling": None if yarn is None else rope_scaling(yarn, family),
        "max_position_embeddings": length,
        "tie_word_embeddings": model["tie_embeddings"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": model["init_std"],
        **special_ids,
    }
    if family == "llama":
        fields |= {name: parts.attention[ours] for name, ours in LLAMA_KEYS.items()} | {"mlp_bias": False}
    else:
        fields |= latent_attention_fields(parts) | expert_fields(parts, family)
    if family == "deepseek_v3":
        fields["num_nextn_predict_layers"] = layers
    shapes = {key: value for key, value in model.items() if key != "init_std"}
    return fields | {"dsv3": {"model": shapes, "attention": {"decode": parts.attention.get("decode")}}}


FAMILIES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "llama": "LlamaForCausalLM",
}
"""model_type -> transformers' class."""

LLAMA_KEYS = {"num_key_value_heads": "n_kv_heads", "head_dim": "head_dim"}
LATENT_KEYS = {
    name: name for name in ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
}
EXPERT_KEYS = {
    "moe_intermediate_size": "moe_inter_dim",
    "n_routed_experts": "n_routed_experts",
    "n_shared_experts": "n_shared_experts",
    "first_k_dense_replace": "n_dense_layers",
}
ROUTING_KEYS = {
    "num_experts_per_tok": "top_k",
    "n_group": "n_groups",
    "topk_group": "topk_groups",
    "routed_scaling_factor": "route_scale",
}


def family_of(parts: Parts) -> str:
    if parts.is_option("attention", "gqa"):
        return "llama"
    softmax = parts.has_experts and parts.is_option("router", "softmax", "softmax_group_limited")
    return "deepseek_v2" if softmax else "deepseek_v3"


def latent_attention_fields(parts: Parts) -> dict[str, Any]:
    fields = {name: parts.attention[ours] for name, ours in LATENT_KEYS.items()}
    return fields | {"num_key_value_heads": parts.attention["n_heads"]}


def expert_fields(parts: Parts, family: str) -> dict[str, Any]:
    routing = parts.router if parts.has_experts else parts.model
    scoring = {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True}
    if family == "deepseek_v2":
        method = "greedy" if routing["n_groups"] == 1 else "group_limited_greedy"
        scoring = {"scoring_func": "softmax", "topk_method": method, "norm_topk_prob": False}
    fields = {name: parts.model[ours] for name, ours in EXPERT_KEYS.items()}
    return fields | {name: routing[ours] for name, ours in ROUTING_KEYS.items()} | scoring | {"moe_layer_freq": 1}


def rope_scaling(yarn: Mapping[str, Any], family: str) -> dict[str, Any]:
    """YaRN's keys. LLaMA scales cos and sin where DeepSeek's models scale the softmax; q.k is the same."""
    fields = {
        "type": "yarn",
        "factor": yarn["factor"],
        "original_max_position_embeddings": yarn["original_length"],
        "beta_fast": yarn["beta_fast"],
        "beta_slow": yarn["beta_slow"],
    }
    if family == "llama":
        return fields | {"attention_factor": rope_gain(yarn["factor"], yarn["mscale"])}
    return fields | {"mscale": yarn["mscale"], "mscale_all_dim": yarn["mscale"]}


def rope_gain(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def obstacles(parts: Parts, mtp_layers: int) -> Iterator[str]:
    """Why no Hugging Face model computes what this configuration does; each as a sentence."""
    model = parts.model
    latent = parts.is_option("attention", "mla")
    if not latent and not parts.is_option("attention", "gqa"):
        yield f"attention._target_={parts.attention['_target_']} is not that of attention=mla or gqa"
        return
    if latent and model["norm_eps"] != LATENT_NORM_EPS:
        yield f"model.norm_eps={model['norm_eps']}, and MLA's latent norms have {LATENT_NORM_EPS} there"
    if not latent and parts.has_experts:
        yield "attention=gqa goes with dense layers only (model.n_dense_layers = model.n_layers)"
    if family_of(parts) != "deepseek_v3" and model["dim"] % parts.attention["n_heads"]:
        yield f"model.dim={model['dim']} is not a multiple of model.n_heads={parts.attention['n_heads']}"
    if mtp_layers and (not latent or family_of(parts) != "deepseek_v3"):
        yield f"{family_of(parts)} has no MTP layers (mtp=false exports without them)"
    if parts.has_experts or mtp_layers:
        if not parts.is_option("experts", "grouped", "loop"):
            yield f"experts._target_={parts.experts['_target_']} is not that of experts=grouped or loop"
        yield from router_obstacles(parts, family_of(parts))
    if mtp_layers:
        yield from mtp_obstacles(parts)


def router_obstacles(parts: Parts, family: str) -> Iterator[str]:
    router = parts.router
    if family == "deepseek_v2":
        if router["normalise_gates"]:
            yield "router.normalise_gates=true, and deepseek_v2's gates are as they are"
        return
    if not parts.is_option("router", "sigmoid_group_limited"):
        yield f"router._target_={router['_target_']} is not the router of a Hugging Face model"
        return
    size = router["n_experts"] // router["n_groups"]
    if size < V3_GROUP_SCORE_TOP:
        yield f"a group of {size} expert is too small for deepseek_v3: it sums the best {V3_GROUP_SCORE_TOP}"
    if router["n_groups"] == 1:
        return  # one group is always kept, whatever its score
    summed = router["group_score_top"] or max(1, router["top_k"] // router["topk_groups"])
    if summed != V3_GROUP_SCORE_TOP:
        yield f"router.group_score_top={summed}, and deepseek_v3 sums the best {V3_GROUP_SCORE_TOP} of a group"
    if not router["biased_groups"]:
        yield "router.biased_groups=false, and deepseek_v3 scores groups with the bias"


def mtp_obstacles(parts: Parts) -> Iterator[str]:
    advice = "(mtp=false exports without the MTP layers)"
    if not parts.is_option("mtp", "deepseek"):
        yield f"mtp._target_={parts.mtp['_target_']} is not that of mtp=deepseek {advice}"
        return
    if parts.mtp["concat"] != "embedding_hidden":
        yield f"mtp.concat={parts.mtp['concat']}, and the published layout is embedding_hidden {advice}"
    if not parts.mtp["after_final_norm"]:
        yield f"mtp.after_final_norm=false, and transformers takes the states after the final norm {advice}"


def hf_to_choices(hf: Mapping[str, Any], *, mtp_layers: int) -> Choices:
    """Options and shapes of the model that a config.json describes, with so many MTP layers among its weights.

    Raises:
        ValueError: the model is none that our options build; the key and its value are in the message.
    """
    hf = Fields(hf)
    family = hf["model_type"]
    if family not in FAMILIES:
        raise ValueError(f"config.json: model_type={family} is not one of {', '.join(FAMILIES)}")
    for key, value in FIXED[family].items():
        if key in hf and hf[key] != value:
            raise ValueError(f"config.json: {key}={hf[key]}, where only {value} can be imported")
    yarn = yarn_of(hf, family)
    model = {
        "vocab_size": hf["vocab_size"],
        "dim": hf["hidden_size"],
        "inter_dim": hf["intermediate_size"],
        "n_layers": hf["num_hidden_layers"],
        "n_heads": hf["num_attention_heads"],
        "norm_eps": hf["rms_norm_eps"],
        "rope_theta": float(rope_fields(hf).get("rope_theta", 10000.0)),
        "yarn": yarn,
        "tie_embeddings": hf.get("tie_word_embeddings", False),
    }
    kept = hf.get("dsv3", {}).get("model", {})
    if family == "llama":
        heads = hf["num_attention_heads"]
        model |= {
            "n_kv_heads": hf.get("num_key_value_heads") or heads,
            "head_dim": hf.get("head_dim") or hf["hidden_size"] // heads,
            "n_dense_layers": hf["num_hidden_layers"],
            "n_routed_experts": 0,
            "n_shared_experts": 0,
        }
        return Choices(["attention=gqa", "balancing=none", "mtp=none"], kept | model)
    model |= {ours: hf[name] for name, ours in (LATENT_KEYS | EXPERT_KEYS).items()}
    model |= {ours: hf[name] for name, ours in ROUTING_KEYS.items()}
    options = ["attention=mla", *routing_options(hf, family)]
    options += ["mtp=deepseek", f"mtp.depth={mtp_layers}"] if mtp_layers else ["mtp=none"]
    if decode := hf.get("dsv3", {}).get("attention", {}).get("decode"):
        options.append(f"attention.decode={decode}")
    one_group = {"n_shared_experts": 0, "n_groups": 1, "topk_groups": 1}
    absent = {key: value for key, value in one_group.items() if model[key] is None}
    return Choices(options, kept | model | absent)


class Fields(dict[str, Any]):
    """A config.json, in which a key that is needed and missing is the user's mistake."""

    def __missing__(self, key: str) -> Any:
        raise ValueError(f"config.json lacks {key}")


COMMON_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
LATENT_FIXED = COMMON_FIXED | {"rms_norm_eps": LATENT_NORM_EPS, "moe_layer_freq": 1}
FIXED: dict[str, dict[str, Any]] = {
    "deepseek_v3": LATENT_FIXED
    | {"scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True, "rope_interleave": True},
    "deepseek_v2": LATENT_FIXED | {"scoring_func": "softmax", "norm_topk_prob": False},
    "llama": COMMON_FIXED,
}
"""Keys of a config.json that have one value in every model of the family that our options build."""


def routing_options(hf: Fields, family: str) -> list[str]:
    if family == "deepseek_v3":
        return ["router=sigmoid_group_limited", f"router.group_score_top={V3_GROUP_SCORE_TOP}", "balancing=v3"]
    methods = {"greedy": "softmax", "group_limited_greedy": "softmax_group_limited"}
    if hf["topk_method"] not in methods:
        raise ValueError(f"config.json: topk_method={hf['topk_method']} is not one of {', '.join(methods)}")
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
        all_dim = round((gain - 1) / (0.1 * math.log(factor)), 9)
    elif not all_dim or not math.isclose(gain, 1.0):
        raise ValueError(
            f"config.json: YaRN with mscale={mscale}, mscale_all_dim={all_dim} scales cos and sin by {gain}; "
            f"only equal values, with which the softmax alone is scaled, can be imported for {family}"
        )
    return {
        "factor": factor,
        "original_length": rope["original_max_position_embeddings"],
        "beta_fast": rope.get("beta_fast") or 32,
        "beta_slow": rope.get("beta_slow") or 1,
        "mscale": all_dim,
    }
