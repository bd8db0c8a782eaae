"""The processes that other tests of this folder run on."""

import os

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed.workers import Workers


def summed(values: Tensor) -> tuple[Tensor, int]:
    total = values * (dist.get_rank() + 1)
    dist.all_reduce(total)
    return total, dist.get_rank()


def one_fails() -> None:
    if dist.get_rank() == 1:
        raise ValueError("the second")
    dist.barrier()


def one_ends() -> None:
    if dist.get_rank() == 0:
        os._exit(3)
    dist.barrier()


def one_waits() -> None:
    if dist.get_rank() == 0:
        dist.barrier()


def test_results_come_by_rank_for_every_number_of_ranks(workers: Workers) -> None:
    for ranks in (4, 2, 1, 3):
        results = workers.run(summed, torch.ones(3), ranks=ranks)
        assert [rank for _, rank in results] == list(range(ranks))
        assert all(torch.equal(total, torch.full((3,), ranks * (ranks + 1) / 2)) for total, _ in results)


def test_the_first_failure_is_raised_and_the_workers_go_on(workers: Workers) -> None:
    with pytest.raises(ValueError, match="the second") as raised:
        workers.run(one_fails, ranks=2)
    assert "one_fails" in raised.value.__notes__[0]
    assert "rank 1 of 2" in raised.value.__notes__[1]
    assert len(workers.run(summed, torch.ones(1))) == 4


def test_workers_that_ended_are_started_again(workers: Workers) -> None:
    with pytest.raises(RuntimeError):
        workers.run(one_ends, ranks=2)
    with pytest.raises(RuntimeError):
        workers.run(one_waits, ranks=2, timeout=2.0)
    assert len(workers.run(summed, torch.ones(1))) == 4
