"""Tables with sparse gradients over ranks: each holds some of the rows, and looks up those of others.

    of a table's R rows, rank p of P holds those from p * ceil(R / P) on, ceil(R / P) or fewer

A rank asks their holders for the rows that its tokens read, each of them once. The gradients of rows go back the same
way, so that a rank has those of its own rows, over all ranks, and of no others: a sparse tensor of the whole table's
shape. Optimiser state and averages are of a rank's own rows too.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import Shard, distribute_tensor

from dsv3.distributed.exchange import exchange, exchanged_counts
from dsv3.distributed.mesh import Mesh
from dsv3.model.layers import first_row, local, on_host


class SharedEmbedding(nn.Embedding):
    """An embedding whose rows lie on the ranks of a group."""

    group: ProcessGroup

    def forward(self, ids: Tensor) -> Tensor:
        return looked_up(ids, self.weight, self.group)


class SharedEmbeddingBag(nn.EmbeddingBag):
    """Sums of rows that lie on the ranks of a group; ids are [bags, rows of each]."""

    group: ProcessGroup

    def forward(self, ids_NM: Tensor) -> Tensor:  # type: ignore[override]
        return looked_up(ids_NM, self.weight, self.group).sum(1)


def share_tables(model: nn.Module, mesh: Mesh) -> None:
    """Leave this rank its rows of every table with sparse gradients, in place.

    Raises:
        ValueError: one of them is looked up in another way than by id.
    """
    parts: dict[nn.Parameter, nn.Parameter] = {}
    for name, module in model.named_modules():
        if getattr(module, "sparse", False):
            kind, weight = shared_kind(name, module), module.get_parameter("weight")
            if weight not in parts:
                rows = distribute_tensor(weight.detach(), mesh.data, [Shard(0)], src_data_rank=None)
                parts[weight] = nn.Parameter(rows)
            module.weight = parts[weight]
            module.__class__ = kind
            module.group = mesh.data.get_group()  # type: ignore[assignment]


def shared_kind(name: str, module: nn.Module) -> type[SharedEmbedding | SharedEmbeddingBag]:
    """The class that looks up over ranks what this table looks up in one process."""
    plain = getattr(module, "padding_idx", None) is None and getattr(module, "max_norm", None) is None
    if plain and type(module) is nn.Embedding:
        return SharedEmbedding
    if plain and type(module) is nn.EmbeddingBag and module.mode == "sum":
        return SharedEmbeddingBag
    raise ValueError(
        f"{name}: a table with sparse gradients, {module}, can be spread over ranks where it is an nn.Embedding or an "
        "nn.EmbeddingBag of mode sum, without padding_idx and max_norm; use one of these, dense gradients, or "
        "parallel=none"
    )


def looked_up(ids: Tensor, weight: Tensor, group: ProcessGroup) -> Tensor:
    """weight[ids] of a table [R, W] whose rows lie on the ranks of `group`, [..., W].

    All ranks of the group call this together, each with its own ids, in 0 .. R - 1.
    """
    each = -(-weight.shape[0] // group.size())
    asked_U, place = ids.unique(return_inverse=True)  # sorted, and so by the rank that holds them
    sent_P = torch.bincount(asked_U.div(each, rounding_mode="floor"), minlength=group.size())
    sent, received = on_host(torch.stack([sent_P, exchanged_counts(sent_P, group)]))
    given_SW = _Rows.apply(weight, exchange(asked_U, sent, received, group))
    rows_UW = exchange(given_SW, received, sent, group)
    return rows_UW.index_select(0, place.flatten()).view(*ids.shape, -1)


class _Rows(torch.autograd.Function):
    """Rows that this rank holds, by their numbers in the whole table; their gradient is sparse."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids_S: Tensor) -> Tensor:
        ctx.save_for_backward(ids_S)
        ctx.shape = weight.shape
        return local(weight).index_select(0, ids_S - first_row(weight))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (ids_S,) = ctx.saved_tensors
        return torch.sparse_coo_tensor(ids_S.unsqueeze(0), grads[0], ctx.shape, check_invariants=False), None
