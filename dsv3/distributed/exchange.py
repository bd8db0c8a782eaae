"""Rows of tensors from every rank of a group to every other, with gradients.

The arguments of a collective differ between ranks and their order does not: each function here is called by all ranks
of the group, also by those that send nothing.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup


def exchange(rows: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
    """The rows that the ranks of `group` send here, in the order of ranks; `rows` are sorted by where they go.

    sent, received: rows to and from each rank. The gradient goes back the same way.
    """
    if rows.requires_grad and torch.is_grad_enabled():
        result: Tensor = _Exchange.apply(rows, sent, received, group)
        return result
    return _exchanged(rows, sent, received, group)


class _Exchange(torch.autograd.Function):
    """Keeps no tensor: the gradient of an exchange is the exchange in the other direction."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchanged(rows, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchanged(grads[0].contiguous(), ctx.received, ctx.sent, ctx.group), None, None, None


def _exchanged(rows: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
    result = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(result, rows.contiguous(), received, sent, group=group)
    return result


def exchanged_counts(sent_P: Tensor, group: ProcessGroup) -> Tensor:
    """int64 [P]: how many rows each rank of the group sends here, of how many this one sends to each."""
    received_P = torch.empty_like(sent_P)
    dist.all_to_all_single(received_P, sent_P, group=group)
    return received_P
