"""Shards a built model over ranks: experts over the ranks that hold them, tables by rows, everything else by FSDP2.

The loss of a step is divided by what the global batch has, so that gradients are summed over ranks, never averaged.
Each block is gathered for its forward and backward pass; embedding, head, final norm and the parts of MTP outside its
blocks are gathered once a pass. Of tables with sparse gradients, ranks exchange the rows that are read.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from dsv3.checkpoint.checkpoint_folder import Stored, read
from dsv3.distributed.mesh import Mesh
from dsv3.distributed.shared_tables import share_tables
from dsv3.model.decoder import Block, Decoder
from dsv3.model.parameters import is_table


def shard(model: Decoder, mesh: Mesh, stages: Sequence[Decoder] = ()) -> None:
    """Replace the parameters of `model` by this rank's parts of them, in place. All ranks hold equal weights before.

    stages: of a pipeline, which were cut from `model` and are on this rank; each is gathered by itself.

    Raises:
        ValueError: the experts cannot be divided among the ranks.
    """
    if mesh.sizes.experts > 1:
        _share_experts(model, mesh)
    if mesh.sizes.data > 1:
        share_tables(model, mesh)
    # A schedule that splits the backward pass needs the weights once more, after FSDP2 has freed them: it would lose
    # gradients without a word. A pipeline keeps them for the step.
    frees = mesh.sizes.stages == 1
    for block in [module for module in model.modules() if isinstance(module, Block)]:
        fully_shard(block, mesh=mesh.data, reshard_after_forward=frees)
    for root in stages or [model]:
        tables = {parameter for parameter in root.parameters() if is_table(root, parameter)}
        fully_shard(root, mesh=mesh.data, reshard_after_forward=False, ignored_params=tables)
        for module in root.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)


def _share_experts(model: Decoder, mesh: Mesh) -> None:
    for name, moe in model.moe_layers():
        connect: Any = getattr(moe.dispatch, "connect", None)
        count = moe.balancing.bias.numel()
        if connect is None:
            raise ValueError(
                f"parallel.experts={mesh.sizes.experts}: {type(moe.dispatch).__name__} takes tokens to experts of its "
                "own process only; dispatch=all_to_all takes them to other ranks"
            )
        if count % mesh.sizes.experts:
            raise ValueError(f"parallel.experts={mesh.sizes.experts}: must divide the {count} experts of {name}")
        connect(mesh.nodes.get_group(), mesh.local.get_group())
        experts: Any = moe.experts
        for module in experts.modules():
            for key, parameter in list(module.named_parameters(recurse=False)):
                part = distribute_tensor(parameter.detach(), mesh.experts, [Shard(0)], src_data_rank=None)
                setattr(module, key, nn.Parameter(part))
        fully_shard(experts, mesh=mesh.replicas, reshard_after_forward=mesh.sizes.stages == 1)


def reduce_gradients(model: nn.Module, now: bool) -> None:
    """Whether the next backward pass sums gradients over ranks, or adds to what this rank has by itself."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(now)


@contextmanager
def evaluating(model: nn.Module, stages: Sequence[nn.Module] = ()) -> Iterator[None]:
    """Evaluation mode, and training mode after it, when every rank has only its parts of the weights again.

    stages: those of a pipeline that was cut from `model`.
    """
    model.eval()
    try:
        yield
    finally:
        release([model, *stages])
        model.train()


def release(models: Sequence[nn.Module]) -> None:
    """Free weights that were gathered from their parts. Without a backward pass they would stay, and the next pass
    would read them although the parts have changed."""
    for module in [module for model in models for module in model.modules()]:
        if isinstance(module, FSDPModule):
            module.reshard()


def whole(tensor: Tensor) -> Tensor:
    """All of a sharded tensor, on every rank of its mesh, which must call this together; others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_like(whole: Tensor | Stored, like: Tensor) -> Tensor:
    """This rank's part of a tensor that every rank has, sharded as `like` is; all of it where that is not sharded."""
    full: Tensor = read(whole)
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def sharded_like(part: Tensor, like: Tensor) -> Tensor:
    """The tensor of which each rank has its plain `part`, sharded as `like` is. Nothing is sent."""
    if not isinstance(like, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


@torch.no_grad()
def load_parts(model: nn.Module, weights: Mapping[str, Tensor | Stored]) -> None:
    """Copy this rank's parts of whole tensors into the parameters and buffers of `model`.

    Raises:
        KeyError: one is missing.
    """
    for name, tensor in model.state_dict(keep_vars=True).items():
        tensor.copy_(part_like(weights[name], tensor))
