"""The three matching Hugging Face model families and their constraints.

    deepseek_v3     attention=mla   router=sigmoid_group_limited (or no experts)    MTP layers
    deepseek_v2     attention=mla   router=softmax or softmax_group_limited
    llama           attention=gqa   dense

Options are known by the `_target_` of their YAML files.
"""

import math
from functools import cache
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from dsv3.paths import CONF

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
"""Names in config.json -> ours, in `attention`, `model` and `router`."""

LATENT_NORM_EPS = 1e-6
"""transformers' MLA has this epsilon in the norms of its latents, whatever the config says."""

V3_GROUP_SCORE_TOP = 2
"""Affinities that the published router sums for a group's score; no config key sets it."""


class Parts(NamedTuple):
    """The sections of a configuration that make the model's function, resolved."""

    model: dict[str, Any]
    memory: dict[str, Any]
    attention: dict[str, Any]
    router: dict[str, Any]
    experts: dict[str, Any]
    mtp: dict[str, Any]

    @classmethod
    def of(cls, config: DictConfig) -> "Parts":
        sections: list[Any] = [OmegaConf.to_container(config[name], resolve=True) for name in cls._fields]
        return cls(*sections)

    def is_option(self, kind: str, *options: str) -> bool:
        """Whether the section has the `_target_` of one of these files of conf/<kind>/."""
        return getattr(self, kind)["_target_"] in {target(kind, option) for option in options}

    @property
    def has_experts(self) -> bool:
        return self.model["n_dense_layers"] < self.model["n_layers"]

    @property
    def mtp_layers(self) -> int:
        return self.mtp.get("depth", 0)


@cache
def target(kind: str, option: str) -> str:
    """The class that conf/<kind>/<option>.yaml names."""
    return str(OmegaConf.load(CONF / kind / f"{option}.yaml")._target_)


def family_of(parts: Parts) -> str:
    if parts.is_option("attention", "gqa"):
        return "llama"
    softmax = parts.has_experts and parts.is_option("router", "softmax", "softmax_group_limited")
    return "deepseek_v2" if softmax else "deepseek_v3"


def rope_gain(factor: float, mscale: float) -> float:
    """YaRN's factor on queries and keys, or its square on their products."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
