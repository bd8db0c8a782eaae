"""Model sizes for planning: the config's shapes, and one layer of each plugin.

What the core defines (embedding, FFNs, norms, head) follows from shapes alone. An attention, a router or an MTP plugin
may be a stranger's, so one layer of each kind is built on the meta device, where a weight has a shape and no
memory, with a precision that does nothing but remember the role of every linear layer.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from enum import Enum
from typing import Any, NamedTuple, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from dsv3.build import build_model
from dsv3.contracts import Attention, GroupedMM, Role
from dsv3.model.decoder import Block, Decoder
from dsv3.model.moe import MoE
from dsv3.model.parameters import is_table


class Projection(nn.Linear):
    """A linear layer that knows its role."""

    def __init__(self, in_features: int, out_features: int, *, role: Role) -> None:
        super().__init__(in_features, out_features, bias=False)
        self.role = role


class GroupedProjection(nn.Module):
    """The weight [E, out, in] of a linear layer per expert."""

    def __init__(self, n_groups: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_groups, out_features, in_features))


class ShapesOnly:
    """A `dsv3.contracts.Precision` whose layers have shapes and roles, and compute nothing of their own."""

    activation_dtype = torch.float32

    def linear(self, in_features: int, out_features: int, *, role: Role) -> nn.Module:
        return Projection(in_features, out_features, role=role)

    def grouped_linear(
        self, n_groups: int, in_features: int, out_features: int, *, role: Role, grouped_mm: GroupedMM
    ) -> nn.Module:
        return GroupedProjection(n_groups, in_features, out_features)

    def swiglu(self, gate_up: torch.Tensor, row_weights: torch.Tensor | None = None) -> torch.Tensor:
        return gate_up.chunk(2, dim=-1)[0]

    def check(self, device: torch.device) -> list[str]:
        return []


class Matrix(NamedTuple):
    """A linear layer made by the precision plugin."""

    role: Role
    inputs: int
    outputs: int

    @property
    def size(self) -> int:
        return self.inputs * self.outputs


@dataclass(frozen=True)
class AttentionLayer:
    """What the attention plugin says of one layer."""

    parameters: int  # norms of its own included
    matrices: tuple[Matrix, ...]
    cache_numbers: int  # that decoding keeps per token
    flops: Callable[[int], int]  # positions seen -> forward operations per token


@dataclass(frozen=True)
class MTPModules:
    """What the MTP plugin says of all its depths together."""

    depth: int
    parameters: int
    matrices: tuple[Matrix, ...]  # those outside its blocks
    dense_blocks: int
    moe_blocks: int


class Place(Enum):
    """Where in a model a parameter is."""

    FIRST = "embedding or memory"
    DENSE = "each block with a dense FFN"
    MOE = "each block with experts, but for these"
    EXPERTS = "routed experts of each such block"
    LAST = "final norm, head, or MTP outside its blocks"


class Shape(NamedTuple):
    """Of a parameter."""

    place: Place
    sizes: tuple[int, ...]
    is_table: bool  # with sparse gradients


@dataclass(frozen=True)
class Skeleton:
    """A model as planning sees it. Sizes are numbers per layer."""

    vocab_size: int
    dim: int
    dense_layers: int
    moe_layers: int
    inter_dim: int  # of a dense FFN
    expert_dim: int
    shared_dim: int  # of all shared experts together; 0: none
    n_experts: int  # E; 0 where no layer has experts
    top_k: int
    n_groups: int  # that the router limits a token's choice by; 1: no limit
    topk_groups: int
    router_parameters: int
    routing_biases: int  # that balancing keeps in a checkpoint
    tie_embeddings: bool
    memory_parameters: int
    memory_active: int  # that one token reads
    attention: AttentionLayer
    mtp: MTPModules
    shapes: tuple[Shape, ...]  # of the parameters of one block of each kind, and of all outside blocks

    @property
    def layers(self) -> int:
        return self.dense_layers + self.moe_layers


def read_skeleton(config: DictConfig) -> Skeleton:
    """Read the sizes of a composed training config (`conf/train.yaml`).

    Raises ValueError (or what the plugin raises) where the config describes no model.
    """
    shapes = config.model
    moe_layers = max(shapes.n_layers - shapes.n_dense_layers, 0)
    dense_layers = shapes.n_layers - moe_layers
    with torch.device("meta"):
        model = build_model(_one_layer_of_each(config, dense_layers, moe_layers), init=False)
    moe = next((module for _, module in model.moe_layers()), None)
    return Skeleton(
        vocab_size=shapes.vocab_size,
        dim=shapes.dim,
        dense_layers=dense_layers,
        moe_layers=moe_layers,
        inter_dim=shapes.inter_dim,
        expert_dim=shapes.moe_inter_dim,
        shared_dim=shapes.n_shared_experts * shapes.moe_inter_dim,
        n_experts=moe.balancing.bias.numel() if moe else 0,
        top_k=cast(Any, moe.router).top_k if moe else 0,
        n_groups=config.router.get("n_groups") or 1,
        topk_groups=config.router.get("topk_groups") or 1,
        router_parameters=_numbers(moe.router) if moe else 0,
        routing_biases=_saved_biases(moe.balancing) if moe else 0,
        tie_embeddings=shapes.tie_embeddings,
        memory_parameters=_numbers(model.memory),
        memory_active=model.memory.active_parameters,
        attention=_read_attention(model.attention(0)),
        mtp=_read_mtp(model),
        shapes=tuple(_read_shapes(model)),
    )


def _one_layer_of_each(config: DictConfig, dense_layers: int, moe_layers: int) -> DictConfig:
    """The config with at most one dense and one MoE layer, whose linear layers only have shapes."""
    reduced = OmegaConf.create(OmegaConf.to_container(config, resolve=False))
    assert isinstance(reduced, DictConfig)
    reduced.model.n_dense_layers = min(dense_layers, 1)
    reduced.model.n_layers = min(dense_layers, 1) + min(moe_layers, 1)
    reduced.precision = {"_target_": f"{ShapesOnly.__module__}.{ShapesOnly.__qualname__}"}
    return reduced


def _read_attention(attention: Attention) -> AttentionLayer:
    module = cast(nn.Module, attention)
    return AttentionLayer(
        parameters=_numbers(module),
        matrices=tuple(_matrices(module)),
        cache_numbers=attention.kv_cache_elements_per_token(),
        flops=attention.flops_per_token,
    )


def _read_mtp(model: Decoder) -> MTPModules:
    mtp = cast(nn.Module, model.mtp)
    blocks = [module for module in mtp.modules() if isinstance(module, Block)]
    inside = {id(module) for block in blocks for module in block.modules()}
    moe_blocks = sum(isinstance(block.mlp, MoE) for block in blocks)
    return MTPModules(
        depth=model.mtp.depth,
        parameters=_numbers(mtp),
        matrices=tuple(_matrices(mtp, without=inside)),
        dense_blocks=len(blocks) - moe_blocks,
        moe_blocks=moe_blocks,
    )


def _read_shapes(model: Decoder) -> Iterator[Shape]:
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    one_of_each = {isinstance(block.mlp, MoE): block for block in blocks}
    for is_moe, block in one_of_each.items():
        experts = set(cast(Any, block.mlp).experts.parameters()) if is_moe else set()
        for parameter in block.parameters():
            place = Place.EXPERTS if parameter in experts else Place.MOE if is_moe else Place.DENSE
            yield Shape(place, tuple(parameter.shape), is_table=False)
    in_blocks = {parameter for block in blocks for parameter in block.parameters()}
    first = {*model.embed_tokens.parameters(), *cast(nn.Module, model.memory).parameters()}
    for parameter in model.parameters():
        if parameter not in in_blocks:
            place = Place.FIRST if parameter in first else Place.LAST
            yield Shape(place, tuple(parameter.shape), is_table(model, parameter))


def _matrices(module: nn.Module, *, without: Collection[int] = ()) -> Iterator[Matrix]:
    for child in module.modules():
        if isinstance(child, Projection) and id(child) not in without:
            yield Matrix(child.role, child.in_features, child.out_features)


def _saved_biases(balancing: Any) -> int:
    """Floating-point state of a balancing method: its bias, if it has one to save (counts of load are integers)."""
    return sum(tensor.numel() for tensor in balancing.state_dict().values() if tensor.is_floating_point())


def _numbers(module: Any) -> int:
    return sum(p.numel() for p in module.parameters()) if isinstance(module, nn.Module) else 0
