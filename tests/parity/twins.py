"""A model of ours with random weights, and its twin in transformers, loaded from what our export writes."""

import copy
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from dsv3.build import build_model
from dsv3.checkpoint.config_out import config_to_hf
from dsv3.checkpoint.layout import pieces, to_huggingface
from dsv3.checkpoint.shards import write_shards
from dsv3.contracts import MicroBatch, Routing
from dsv3.model.decoder import Decoder
from dsv3.model.losses import linear_cross_entropy

disable_progress_bar()

CONF = Path(__file__).resolve().parents[2] / "conf"
TIE = 1e-6
"""Two scores closer than this may come in either order in FP32."""


def copied(make: Callable[..., Decoder]) -> Callable[..., Decoder]:
    """`make`, called once for the same arguments: each caller gets a copy, which takes a tenth of the time."""
    made = cache(make)
    return lambda *args, **kwargs: copy.deepcopy(made(*args, **kwargs))


@cache
def base(options: tuple[str, ...]) -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", ["model=small", "precision=fp32", *options])


def configured(*options: str, **model: Any) -> DictConfig:
    """conf/train.yaml with these options and these shapes."""
    config = copy.deepcopy(base(options))
    config.model.update(model)
    return config


def random_model(config: DictConfig, *, seed: int) -> Decoder:
    """Weights with which every part has a say: matrices that keep a vector's length, norms and biases unequal."""
    model = build_model(config, init=False)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 1 + 0.2 * noise)
        model.embed_tokens.weight.mul_(config.model.dim**0.5)
        for name, buffer in model.named_buffers():
            if name.endswith(".bias") and name in model.state_dict():
                buffer.copy_(0.1 * torch.randn(buffer.shape, generator=generator))
    return model.eval()


def write_twin(config: DictConfig, model: Decoder, folder: Path, *, mtp: bool) -> None:
    """config.json and safetensors of the model, by our export functions."""
    fields = config_to_hf(config, {}, mtp=mtp)
    tensors = to_huggingface(
        model.state_dict(),
        n_layers=config.model.n_layers,
        tied=config.model.tie_embeddings,
        mtp=mtp,
        routing_bias=fields["model_type"] == "deepseek_v3",
    )
    (folder / "config.json").write_text(json.dumps(fields))
    write_shards(folder, tensors, dtype=torch.float32, max_bytes=10**9)


def load_twin(folder: Path, *, unexpected: bool = True) -> Any:
    """The model as transformers' plain loops compute it; every key but the MTP layer's must find its place.

    unexpected: transformers may name the MTP layer's keys as left over (at 61 layers it must not).
    """
    model, info = AutoModelForCausalLM.from_pretrained(
        folder,
        attn_implementation="eager",
        experts_implementation="eager",
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not info["missing_keys"]
    assert not info["mismatched_keys"]
    assert all(key.startswith(f"model.layers.{model.config.num_hidden_layers}.") for key in info["unexpected_keys"])
    assert unexpected or not info["unexpected_keys"]
    model.generation_config.eos_token_id = None
    return model.eval()


def micro_batch(tokens_BT: Tensor, targets_BT: Tensor) -> MicroBatch:
    positions_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    return MicroBatch(tokens_BT, targets_BT, positions_BT, torch.ones_like(tokens_BT), torch.zeros_like(tokens_BT))


def our_loss(model: Decoder, batch: MicroBatch) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over the targets, and the logits."""
    hidden_BTD = model(batch, with_mtp=False).hidden_BTD
    loss = linear_cross_entropy(hidden_BTD.flatten(0, 1), model.lm_head.weight, batch.targets_BT.flatten())
    return loss.total / loss.targets, model.lm_head(hidden_BTD)


def distance(ours: Tensor, theirs: Tensor, *, noise: float = 0.0) -> float:
    """max |a - b| / max |b|; 0 where both are below `noise`: what should be zero is rounding there."""
    largest = theirs.abs().max().item()
    if max(largest, ours.abs().max().item()) <= noise:
        return 0.0
    return (ours - theirs).abs().max().item() / largest


def gradients_by_their_names(model: Decoder, n_layers: int) -> dict[str, Tensor]:
    """The gradients of our parameters, cut as the parameters are for export."""
    return {
        theirs: parameter.grad[index]
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
        for theirs, index in pieces(name, parameter.shape, n_layers=n_layers)
    }


def their_gradients(model: Any) -> dict[str, Tensor]:
    """transformers' gradients by the names of its checkpoints, its stacked experts cut apart."""
    result = {}
    for name, parameter in model.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        if name.endswith("mlp.experts.gate_up_proj"):
            for expert, matrix in enumerate(gradient):
                for projection, half in zip(("gate", "up"), matrix.chunk(2), strict=True):
                    result[name.replace("gate_up_proj", f"{expert}.{projection}_proj.weight")] = half
        elif name.endswith("mlp.experts.down_proj"):
            for expert, matrix in enumerate(gradient):
                result[name.replace("down_proj", f"{expert}.down_proj.weight")] = matrix
        elif parameter.numel():
            result[name] = gradient
    return result


def near_ties(model: Decoder, routings: dict[str, Routing], shape: tuple[int, int]) -> Tensor:
    """True, [B, T], from the first position on whose choice of groups or experts rounding may turn over."""
    tied_BT = torch.zeros(shape, dtype=torch.bool)
    for name, moe in model.moe_layers():
        if name not in routings:
            continue
        router, scores_NE = moe.router, routings[name].affinities_NE + moe.balancing.bias
        by_group = scores_NE.unflatten(1, (router.n_groups, -1))
        top = getattr(router, "group_score_top", 1)
        groups_NG = by_group.topk(top, -1).values.sum(-1)
        tied_N = gap(groups_NG, router.topk_groups) < TIE
        kept_NG = torch.zeros_like(groups_NG).scatter_(1, groups_NG.topk(router.topk_groups, -1).indices, 1.0)
        allowed_NE = by_group.masked_fill(kept_NG.unsqueeze(-1) == 0, -1e9).flatten(1)
        tied_N |= gap(allowed_NE, router.top_k) < TIE
        tied_BT |= tied_N.view(shape)
    return tied_BT.cummax(1).values


def gap(scores: Tensor, kept: int) -> Tensor:
    """By how much the lowest score kept exceeds the highest dropped."""
    if kept == scores.shape[1]:
        return torch.full((scores.shape[0],), float("inf"))
    ordered = scores.sort(-1, descending=True).values
    return ordered[:, kept - 1] - ordered[:, kept]
