"""Computes with whole matrices where the rows of weights are sharded: each matrix on one rank.

The parts of matrix k travel to rank k mod P by one all-to-all, and the rows of its result back by another: with P ranks
each computes one P-th of the matrices and receives one P-th of the numbers. Stacks of matrices that are sharded by
whole matrices, as experts are, do not travel.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from dsv3.distributed.exchange import exchange
from dsv3.model.layers import local

OfWhole = Callable[[Mapping[int, Tensor]], Mapping[int, Tensor]]
"""Whole matrices, by index -> as many of the same shapes."""


def apply_to_whole(tensors: Sequence[Tensor], function: OfWhole, *, dtype: torch.dtype) -> list[Tensor]:
    """This rank's parts of `function` of each tensor [..., out, in], all of one dtype; those of results are in `dtype`.

    All ranks call this together.
    """
    split = [i for i, tensor in enumerate(tensors) if is_split(tensor)]
    at_hand = {i: local(tensor) for i, tensor in enumerate(tensors) if i not in split}
    if not split:
        results = function(at_hand)
        return [results[i] for i in range(len(tensors))]
    rows = _Rows([tensors[i] for i in split])
    owned = {split[k]: matrix for k, matrix in rows.gathered().items()}
    results = function(at_hand | owned)
    parts = rows.returned({k: results[i] for k, i in enumerate(split) if i in owned}, dtype)
    return [results[i] if i in at_hand else parts[split.index(i)] for i in range(len(tensors))]


def is_split(tensor: Tensor) -> bool:
    """Whether ranks have different rows of the same matrix."""
    if not isinstance(tensor, DTensor):
        return False
    return any(isinstance(placement, Shard) and tensor.ndim - placement.dim <= 2 for placement in tensor.placements)


class _Rows:
    """Matrices [out, in] whose rows lie on the ranks of one group, as `torch.chunk` cuts them."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        assert all(isinstance(tensor, DTensor) and tensor.ndim == 2 for tensor in tensors)
        self.parts = [local(tensor) for tensor in tensors]
        self.shapes = [tensor.shape for tensor in tensors]
        self.group = tensors[0].device_mesh.get_group()  # type: ignore[attr-defined]
        self.rank, self.ranks = self.group.rank(), self.group.size()

    def owned_by(self, rank: int) -> range:
        return range(rank, len(self.parts), self.ranks)

    def rows(self, k: int, rank: int) -> int:
        """Rows of matrix k on a rank."""
        chunk = -(-self.shapes[k][0] // self.ranks)
        return max(0, min(chunk, self.shapes[k][0] - rank * chunk))

    def numbers(self, matrices: range, rank: int) -> int:
        return sum(self.rows(k, rank) * self.shapes[k][1] for k in matrices)

    def gathered(self) -> dict[int, Tensor]:
        """The matrices that this rank computes."""
        own = self.owned_by(self.rank)
        order = [k for rank in range(self.ranks) for k in self.owned_by(rank)]
        sent = [self.numbers(self.owned_by(rank), self.rank) for rank in range(self.ranks)]
        received = [self.numbers(own, rank) for rank in range(self.ranks)]
        flat = exchange(torch.cat([self.parts[k].flatten() for k in order]), sent, received, self.group)
        pieces: dict[int, list[Tensor]] = {k: [] for k in own}
        sizes = [(k, self.rows(k, rank)) for rank in range(self.ranks) for k in own]
        for (k, rows), piece in zip(sizes, flat.split([rows * self.shapes[k][1] for k, rows in sizes])):
            pieces[k].append(piece.view(rows, self.shapes[k][1]))
        return {k: torch.cat(of_matrix) for k, of_matrix in pieces.items()}

    def returned(self, results: Mapping[int, Tensor], dtype: torch.dtype) -> list[Tensor]:
        """This rank's rows of every result, of which each rank gives those that it computed."""
        own = self.owned_by(self.rank)
        sent = [self.numbers(own, rank) for rank in range(self.ranks)]
        received = [self.numbers(self.owned_by(rank), self.rank) for rank in range(self.ranks)]
        by_rank = {k: results[k].split([self.rows(k, rank) for rank in range(self.ranks)]) for k in own}
        nothing = self.parts[0].new_empty(0, dtype=dtype)
        flat = torch.cat([nothing, *(by_rank[k][rank].flatten() for rank in range(self.ranks) for k in own)])
        back = exchange(flat, sent, received, self.group)
        sources = [k for rank in range(self.ranks) for k in self.owned_by(rank)]
        parts = back.split([self.parts[k].numel() for k in sources])
        found = {k: part.view_as(self.parts[k]) for k, part in zip(sources, parts)}
        return [found[k] for k in range(len(self.parts))]
