"""Names and slices of tensors: ours <-> those of Hugging Face's checkpoints.

Ours stacks the experts of a layer and joins gate and up projections; theirs has one matrix for each:

    layers.3.mlp.experts.gate_up_proj.weight [E, 2F, D]   model.layers.3.mlp.experts.{e}.{gate,up}_proj.weight [F, D]
    layers.3.mlp.router.weight                            model.layers.3.mlp.gate.weight
    layers.3.mlp.balancing.(...).bias                     model.layers.3.mlp.gate.e_score_correction_bias
    mtp.depths.0.block.self_attn.o_proj.weight          model.layers.{n_layers}.self_attn.o_proj.weight
    mtp.depths.0.norm.weight                            model.layers.{n_layers}.shared_head.norm.weight

Their MTP layers also hold copies of the embedding and the head.
"""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from dsv3.contracts import is_precision_state

Index = tuple[int | slice, ...]

BIAS = "mlp.gate.e_score_correction_bias"
MTP_COPIES = ("embed_tokens.weight", "shared_head.head.weight")


def pieces(name: str, shape: torch.Size, *, n_layers: int) -> Iterator[tuple[str, Index]]:
    """Hugging Face's names for one of our tensors, and which part of it each names.

    n_layers: of the main model; MTP layers are numbered from there. Counts of load have no name, nor has what a
    precision remembers.

    Raises:
        ValueError: the tensor is of a part that Hugging Face's models do not have.
    """
    if is_precision_state(name):
        return
    if name in ("embed_tokens.weight", "norm.weight"):
        yield f"model.{name}", ()
    elif name == "lm_head.weight":
        yield name, ()
    elif match := re.fullmatch(r"layers\.(\d+)\.(.+)", name):
        yield from layer_pieces(f"model.layers.{match[1]}", match[2], shape)
    elif match := re.fullmatch(r"mtp\.depths\.(\d+)\.(.+)", name):
        prefix = f"model.layers.{n_layers + int(match[1])}"
        if match[2] == "norm.weight":
            yield f"{prefix}.shared_head.norm.weight", ()
        else:
            yield from layer_pieces(prefix, match[2].removeprefix("block."), shape)
    else:
        raise ValueError(f"Hugging Face's format has no place for the tensor {name}")


def layer_pieces(prefix: str, name: str, shape: torch.Size) -> Iterator[tuple[str, Index]]:
    if name.startswith("mlp.balancing."):
        if name.endswith(".bias"):
            yield f"{prefix}.{BIAS}", ()
    elif name == "mlp.router.weight":
        yield f"{prefix}.mlp.gate.weight", ()
    elif match := re.fullmatch(r"mlp\.experts\.(gate_up_proj|down_proj)\.weight", name):
        for expert in range(shape[0]):
            for projection, rows in halves(match[1], shape[1]):
                yield f"{prefix}.mlp.experts.{expert}.{projection}.weight", (expert, *rows)
    elif match := re.fullmatch(r"(mlp\.|mlp\.shared_experts\.)(gate_up_proj|down_proj)\.weight", name):
        for projection, rows in halves(match[2], shape[0]):
            yield f"{prefix}.{match[1]}{projection}.weight", rows
    elif name.endswith(("proj.weight", "proj_with_mqa.weight", "norm.weight")) and not name.startswith("mlp."):
        yield f"{prefix}.{name}", ()
    else:
        raise ValueError(f"Hugging Face's format has no place for the tensor {name} of {prefix.removeprefix('model.')}")


def halves(projection: str, rows: int) -> list[tuple[str, Index]]:
    """Gates come first in a joined projection."""
    if projection != "gate_up_proj":
        return [(projection, ())]
    return [("gate_proj", (slice(0, rows // 2),)), ("up_proj", (slice(rows // 2, rows),))]


def to_huggingface(
    state: Mapping[str, Tensor], *, n_layers: int, tied: bool, mtp: bool, routing_bias: bool
) -> dict[str, Tensor]:
    """Our state_dict under their names; the tensors are views of ours.

    tied: the head is the embedding, and is stored once. mtp: with the MTP layers. routing_bias: the family has one.
    Where balancing keeps none, or there are no shared experts, theirs has zeros, or matrices without rows.

    Raises:
        ValueError: a bias is not zero in a family without one.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        if (name.startswith("mtp.") and not mtp) or (name == "lm_head.weight" and tied):
            continue
        for theirs, index in pieces(name, tensor.shape, n_layers=n_layers):
            result[theirs] = result[theirs] + tensor if theirs in result else tensor[index]
    for name in [name for name in result if name.endswith(".mlp.gate.weight")]:
        complete_layer(result, name.removesuffix(".mlp.gate.weight"), routing_bias)
    for layer in {name.split(".")[2] for name in result if name.endswith(".eh_proj.weight")}:
        for copy, name in zip(MTP_COPIES, ("embed_tokens.weight", "lm_head.weight"), strict=True):
            result[f"model.layers.{layer}.{copy}"] = state[name]
    return result


def complete_layer(result: dict[str, Tensor], prefix: str, routing_bias: bool) -> None:
    """Add what theirs always has in a layer with experts, and drop a bias of zeros that it never has."""
    router = result[f"{prefix}.mlp.gate.weight"]
    bias = result.pop(f"{prefix}.{BIAS}", torch.zeros(router.shape[0]))
    if routing_bias:
        result[f"{prefix}.{BIAS}"] = bias
    elif bias.any():
        raise ValueError(f"{prefix.removeprefix('model.')} has a routing bias, and models of its family have none")
    dim = router.shape[1]
    for projection, shape in (("gate_proj", (0, dim)), ("up_proj", (0, dim)), ("down_proj", (dim, 0))):
        result.setdefault(f"{prefix}.mlp.shared_experts.{projection}.weight", router.new_empty(shape))


class Target:
    """Our state_dict as the place that their tensors are copied into, one by one."""

    def __init__(self, state: Mapping[str, Tensor], *, n_layers: int, tied: bool) -> None:
        self.n_layers = n_layers
        self.views = {
            theirs: tensor[index]
            for name, tensor in state.items()
            for theirs, index in pieces(name, tensor.shape, n_layers=n_layers)
        }
        self.missing = {name for name in self.views if not (tied and name == "lm_head.weight")}

    def needs(self, name: str) -> bool:
        """Whether a tensor of theirs is to be copied. Repeated and derived ones are not.

        Raises:
            ValueError: it is a weight that ours has no place for.
        """
        if name in self.views:
            return True
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
        repeated = match and int(match[1]) >= self.n_layers and match[2] in MTP_COPIES
        without_rows = match and match[2].startswith("mlp.shared_experts.")  # what no shared experts look like
        if repeated or without_rows or name.endswith("rotary_emb.inv_freq"):
            return False
        raise ValueError(f"{name} is a weight that a model of this config.json does not have")

    @torch.no_grad()
    def copy(self, name: str, tensor: Tensor) -> None:
        view = self.views[name]
        if view.shape != tensor.shape:
            raise ValueError(f"{name} is {list(tensor.shape)}; config.json makes it {list(view.shape)}")
        view.copy_(tensor)
        self.missing.discard(name)
