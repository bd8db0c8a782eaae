"""One model in our implementation and in transformers', with the same weights."""

from collections.abc import Iterator
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from dsv3.build import build_model
from dsv3.checkpoint.config_out import config_to_hf
from dsv3.checkpoint.layout import to_huggingface
from dsv3.contracts import MicroBatch
from dsv3.model.decoder import Decoder
from dsv3.paths import CONF

SHAPES = (
    "model=small",
    "model.n_layers=6",
    "model.n_heads=4",
    "tokenizer.vocab_size=8192",
    "logger=none",
    "router.group_score_top=2",
)
"""Width 256, 6 layers (one dense), 32 experts of which 4, vocabulary 8192: the size that all figures are of."""

ROWS, LENGTH = 8, 512
EXPERTS = ("eager", "batched_mm", "grouped_mm")
"""transformers' ways of computing experts."""


def configured(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*SHAPES, *overrides])


def ours(*overrides: str, device: torch.device) -> tuple[DictConfig, Decoder]:
    unpadded = ["dispatch.pad_multiple=1"] if device.type == "cuda" else []
    config = configured(*unpadded, *overrides)
    return config, build_model(config).to(device)


def theirs(config: DictConfig, model: Decoder, *, dtype: torch.dtype, experts: str) -> Any:
    """transformers' DeepseekV3 with the weights of `model`, on its device, without its MTP modules, for SDPA."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    fields = config_to_hf(config, {}, mtp=False)
    for name in ("model_type", "architectures", "dsv3"):
        fields.pop(name)
    build: Any = DeepseekV3ForCausalLM._from_config
    twin = build(DeepseekV3Config(**fields), attn_implementation="sdpa", experts_implementation=experts)
    wanted = twin.state_dict()
    given = dict(
        to_huggingface(model.state_dict(), n_layers=config.model.n_layers, tied=False, mtp=False, routing_bias=True)
    )
    for name, tensor in wanted.items():
        tensor.copy_(stacked(name, given, config.model.n_routed_experts))
    return twin.to(model.device, dtype)


def stacked(name: str, given: dict[str, torch.Tensor], n_experts: int) -> torch.Tensor:
    """A weight of transformers' model, which stacks the experts that checkpoints keep apart."""
    if name in given:
        return given[name]
    base, _, part = name.rpartition(".")
    projections = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[part]
    matrices = [torch.cat([given[f"{base}.{e}.{p}.weight"] for p in projections]) for e in range(n_experts)]
    return torch.stack(matrices)


def batches(vocab_size: int, *, device: torch.device, seed: int = 0) -> Iterator[MicroBatch]:
    """Endless micro-batches of random tokens; as in training, none comes twice, and so no expert's load does."""
    generator = torch.Generator().manual_seed(seed)
    positions_BT = torch.arange(LENGTH).expand(ROWS, -1)
    ones_BT = torch.ones(ROWS, LENGTH, dtype=torch.int64)
    while True:
        row = torch.randint(0, vocab_size, (ROWS, LENGTH + 1), generator=generator)
        batch = (row[:, :-1].contiguous(), row[:, 1:].contiguous(), positions_BT, ones_BT, ones_BT - 1)
        yield MicroBatch(*batch).map(lambda tensor: tensor.to(device))
