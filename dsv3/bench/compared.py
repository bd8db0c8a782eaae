"""One model in our implementation and in transformers', with the same weights."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import nn

from dsv3.build import build_model
from dsv3.checkpoint.config_out import config_to_hf
from dsv3.checkpoint.layout import to_huggingface
from dsv3.contracts import MicroBatch
from dsv3.model.decoder import Decoder
from dsv3.paths import CONF


class Size(NamedTuple):
    """What is measured: a model, and micro-batches of random tokens."""

    overrides: tuple[str, ...]
    rows: int
    length: int

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.rows * self.length


STANDARD = Size(
    (
        "model=small",
        "model.n_layers=6",
        "model.n_heads=4",
        "tokenizer.vocab_size=8192",
        "router.group_score_top=2",
    ),
    rows=8,
    length=512,
)
"""Width 256, 6 layers (one dense), 32 experts of which 4, vocabulary 8192: the size that all figures are of, but for
those of `gpu_check`."""

EXPERTS = ("eager", "batched_mm", "grouped_mm")
"""transformers' ways of computing experts."""


def configured(size: Size, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*size.overrides, "logger=none", *overrides])


def ours(size: Size, *overrides: str, device: torch.device) -> tuple[DictConfig, Decoder]:
    config = configured(size, *overrides)
    return config, drawn_on(config, device)


def drawn_on(config: DictConfig, device: torch.device) -> Decoder:
    """The model; for a GPU, its weights are drawn there, not by the CPU, which would take minutes for a large one."""
    if device.type == "cpu":
        return build_model(config)
    with torch.device(device):
        model, generator = build_model(config, init=False), torch.Generator(device).manual_seed(config.seed)
    for parameter in model.parameters():
        if parameter.ndim >= 2:
            nn.init.normal_(parameter, std=config.model.init_std, generator=generator)
    return model


def theirs(config: DictConfig, model: Decoder, *, dtype: torch.dtype, experts: str) -> Any:
    """transformers' DeepseekV3 with the weights of `model`, on its device, without its MTP modules, for SDPA."""
    twin = drawn_anew(config, dtype=torch.float32, experts=experts)
    wanted = twin.state_dict()
    given = dict(
        to_huggingface(model.state_dict(), n_layers=config.model.n_layers, tied=False, mtp=False, routing_bias=True)
    )
    for name, tensor in wanted.items():
        tensor.copy_(stacked(name, given, config.model.n_routed_experts))
    return twin.to(model.device, dtype)


def drawn_anew(config: DictConfig, *, dtype: torch.dtype, experts: str) -> Any:
    """The same model with weights of transformers' own, made on torch's default device."""
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    fields = config_to_hf(config, {}, mtp=False)
    for name in ("model_type", "architectures", "dsv3"):
        fields.pop(name)
    fields["dtype"] = dtype
    build: Any = DeepseekV3ForCausalLM._from_config
    return build(DeepseekV3Config(**fields), attn_implementation="sdpa", experts_implementation=experts)


def stacked(name: str, given: dict[str, torch.Tensor], n_experts: int) -> torch.Tensor:
    """A weight of transformers' model, which stacks the experts that checkpoints keep apart."""
    if name in given:
        return given[name]
    base, _, part = name.rpartition(".")
    projections = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}[part]
    matrices = [torch.cat([given[f"{base}.{e}.{p}.weight"] for p in projections]) for e in range(n_experts)]
    return torch.stack(matrices)


def batches(size: Size, vocab_size: int, *, device: torch.device, seed: int = 0) -> Iterator[MicroBatch]:
    """Endless micro-batches of random tokens; as in training, none comes twice, and so no expert's load does."""
    generator = torch.Generator().manual_seed(seed)
    positions_BT = torch.arange(size.length).expand(size.rows, -1)
    ones_BT = torch.ones(size.rows, size.length, dtype=torch.int64)
    while True:
        row = torch.randint(0, vocab_size, (size.rows, size.length + 1), generator=generator)
        batch = (row[:, :-1].contiguous(), row[:, 1:].contiguous(), positions_BT, ones_BT, ones_BT - 1)
        yield MicroBatch(*batch).map(lambda tensor: tensor.to(device))
