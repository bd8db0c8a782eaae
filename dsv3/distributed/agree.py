"""Agreement of ranks: sums, maxima, objects of rank 0, an order of turns. In one process nothing is sent."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def several() -> bool:
    """Whether this process is one of several that train together."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's number; 0 in one process."""
    return dist.get_rank() if several() else 0


def sum_over_ranks(values: Tensor, group: "dist.ProcessGroup | None" = None) -> Tensor:
    """In place: the sum of every rank's `values`, which all ranks give in one shape and dtype. `group`: None: all."""
    if several():
        dist.all_reduce(values, group=group)
    return values


def max_over_ranks(values: Sequence[Tensor], device: torch.device) -> None:
    """In place: the largest of every rank's `values`, element by element, by one reduction on `device`."""
    if several() and values:
        largest = torch.cat([value.flatten().to(device) for value in values])
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        for value, part in zip(values, largest.split([value.numel() for value in values]), strict=True):
            value.copy_(part.view_as(value))


def of_rank_zero(value: T) -> T:
    """Rank 0's `value`, on every rank."""
    if not several():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def gathered(value: T) -> list[T]:
    """Every rank's `value`, in the order of ranks, on every rank."""
    if not several():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def wait_for_all() -> None:
    if several():
        dist.barrier()


@contextmanager
def first(is_first: bool) -> Iterator[None]:
    """Ranks for which `is_first` run what is inside before the others do."""
    if several() and not is_first:
        dist.barrier()
    yield
    if several() and is_first:
        dist.barrier()
