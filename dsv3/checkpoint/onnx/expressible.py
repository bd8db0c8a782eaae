"""Models that the ONNX graph of `step_graph` computes."""

from collections.abc import Iterator

from omegaconf import DictConfig

from dsv3.checkpoint.families import Parts, target

KNOWN = {
    "memory": ("none",),
    "attention": ("mla", "gqa"),
    "mtp": ("none", "deepseek"),
    "precision": ("auto", "bf16", "fp32"),
}
OF_EXPERTS = {
    "router": ("sigmoid_group_limited", "softmax", "softmax_group_limited"),
    "experts": ("grouped", "loop"),
    "dispatch": ("local", "all_to_all"),
}
"""Options of conf/ by kind. A precision says what training computes in: the graph computes in FP32."""


def inexpressible(config: DictConfig) -> list[str]:
    """Every part that the graph cannot express, as `key=value: what it can`; empty where it computes the model."""
    parts = Parts.of(config)
    known = KNOWN | (OF_EXPERTS if parts.has_experts or parts.mtp_layers else {})
    return list(_unknown(config, known))


def _unknown(config: DictConfig, known: dict[str, tuple[str, ...]]) -> Iterator[str]:
    for kind, options in known.items():
        chosen = config[kind]._target_
        if chosen not in {target(kind, option) for option in options}:
            yield f"{kind}._target_={chosen}: the graph has {kind}={' or '.join(options)}"
