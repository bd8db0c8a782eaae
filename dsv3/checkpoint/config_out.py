"""Our configuration -> config.json.

What a family cannot represent is refused, all of it together. What has no say in the model's function (widths that
its attention does not use, how it decodes) goes into a section `dsv3` of config.json, so that an import restores it.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig

from dsv3.checkpoint.families import (
    EXPERT_KEYS,
    FAMILIES,
    LATENT_KEYS,
    LATENT_NORM_EPS,
    LLAMA_KEYS,
    ROUTING_KEYS,
    V3_GROUP_SCORE_TOP,
    Parts,
    family_of,
    rope_gain,
)

NO_YARN = {"factor": 1.0, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0}
"""Plain RoPE as YaRN: every frequency is interpolated by 1. vLLM's uncompiled plain RoPE for these models turns token t
as if it were 4t on a CPU, and says nothing; its YaRN is right. transformers computes the same from both."""


def config_to_hf(config: DictConfig, special_ids: Mapping[str, int], *, mtp: bool) -> dict[str, Any]:
    """config.json of the model that `config` describes, without dtype.

    special_ids: `bos_token_id` and the like, as far as the tokenizer has them. mtp: with the MTP layers.

    Raises:
        ValueError: no family has such a model; every reason is in the message.
    """
    parts = Parts.of(config)
    layers = parts.mtp_layers if mtp else 0
    problems = list(unsupported_features(parts, layers))
    if problems:
        raise ValueError("Hugging Face's format cannot hold this model: " + "; ".join(problems))
    family = family_of(parts)
    model = parts.model
    yarn = parts.attention["yarn"]
    length = config.data.sequence_length if yarn is None else int(yarn["factor"] * yarn["original_length"])
    if yarn is None and family != "llama":
        yarn = NO_YARN | {"original_length": length}
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


def unsupported_features(parts: Parts, mtp_layers: int) -> Iterator[str]:
    """Why no Hugging Face model computes what this configuration does; each as a sentence."""
    model = parts.model
    if not parts.is_option("memory", "none"):
        yield f"memory._target_={parts.memory['_target_']}: its models have none (memory=none)"
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
        yield from unsupported_routing(parts, family_of(parts))
    if mtp_layers:
        yield from unsupported_mtp(parts)


def unsupported_routing(parts: Parts, family: str) -> Iterator[str]:
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
        wants = f"deepseek_v3 sums the best {V3_GROUP_SCORE_TOP} of a group"
        advice = f"train with router.group_score_top={V3_GROUP_SCORE_TOP}"
        yield f"router.group_score_top={summed} (which null takes from top_k / topk_groups), and {wants} ({advice})"
    if not router["biased_groups"]:
        yield "router.biased_groups=false, and deepseek_v3 scores groups with the bias"


def unsupported_mtp(parts: Parts) -> Iterator[str]:
    advice = "(mtp=false exports without the MTP layers)"
    if not parts.is_option("mtp", "deepseek"):
        yield f"mtp._target_={parts.mtp['_target_']} is not that of mtp=deepseek {advice}"
        return
    if parts.mtp["concat"] != "embedding_hidden":
        yield f"mtp.concat={parts.mtp['concat']}, and the published layout is embedding_hidden {advice}"
    if not parts.mtp["after_final_norm"]:
        yield f"mtp.after_final_norm=false, and transformers takes the states after the final norm {advice}"
