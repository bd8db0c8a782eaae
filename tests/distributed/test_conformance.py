"""Conformance over several ranks: the shipped parts pass, parts with one fault each do not."""

import os
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import dsv3.testing.parallel
from dsv3.contracts import Denominators, Step
from dsv3.distributed.agree import rank
from dsv3.testing import check_dispatch, check_parallel
from dsv3.testing.connected_dispatch import RANKS, check_connected
from dsv3.testing.ranks import on_ranks
from plugins.dispatch.all_to_all import AllToAllDispatch
from plugins.objective.pretraining import Pretraining
from tests.distributed.workers import Workers


class Dropping(AllToAllDispatch):
    """Drops the last token of rank 1."""

    def __call__(self, x_ND: Tensor, routing: Any, experts: Any) -> Tensor:
        y_ND = super().__call__(x_ND, routing, experts)
        kept_N = torch.arange(len(y_ND)) < len(y_ND) - (rank() == 1)
        return y_ND * kept_N.unsqueeze(1)


class WithoutGateGradient(AllToAllDispatch):
    """Forgets the gradient of gates where tokens travel."""

    def __call__(self, x_ND: Tensor, routing: Any, experts: Any) -> Tensor:
        gates_NK = routing.gates_NK.detach() if self.hops else routing.gates_NK
        return super().__call__(x_ND, routing._replace(gates_NK=gates_NK), experts)


class OwnWeightGradient(AllToAllDispatch):
    """Doubles the gradient of the experts' weights."""

    def __call__(self, x_ND: Tensor, routing: Any, experts: Any) -> Tensor:
        twice = experts if not self.hops else lambda *given: _doubled(experts(*given))
        return super().__call__(x_ND, routing, twice)


def _doubled(y: Tensor) -> Tensor:
    return 2 * y - y.detach()


class NodesSwapped(AllToAllDispatch):
    """Takes the ranks of a node for its nodes."""

    def connect(self, nodes: Any, local: Any) -> None:
        super().connect(local, nodes)


class DroppingInTwoHops(AllToAllDispatch):
    """Drops a token only where there are nodes of several ranks."""

    def __call__(self, x_ND: Tensor, routing: Any, experts: Any) -> Tensor:
        y_ND = super().__call__(x_ND, routing, experts)
        return y_ND * (torch.arange(len(y_ND)) > 0).unsqueeze(1) if len(self.hops) == 2 else y_ND


class OwnMean(Pretraining):
    """Divides by what two ranks have on average, not by what they have together."""

    def denominators(self, step: Step) -> Denominators:
        found = super().denominators(step)
        return {name: count / (2 if dist.is_initialized() else 1) for name, count in found.items()}


def test_the_shipped_dispatch_conforms(workers: Workers) -> None:
    workers.run(check_connected, partial(AllToAllDispatch, pad_multiple=8), ranks=RANKS)


@pytest.mark.parametrize(
    ("dispatch", "words"),
    [
        (Dropping, "4 ranks of one node, as many tokens on every rank, without gradients: the output must be the sum"),
        (WithoutGateGradient, "the gradient of gates_NK must be"),
        (OwnWeightGradient, "the gradient of"),
        (NodesSwapped, "2 nodes of 2 ranks, .* ranks of a node following each other"),
        (DroppingInTwoHops, "2 nodes of 2 ranks, .* No token is dropped"),
    ],
)
def test_faulty_dispatches_are_found(workers: Workers, dispatch: Any, words: str) -> None:
    with pytest.raises(AssertionError, match=words):
        workers.run(check_connected, partial(dispatch, pad_multiple=1), ranks=RANKS, timeout=30.0)


@pytest.fixture
def by_workers(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that need not be started."""
    monkeypatch.setattr(dsv3.testing.parallel, "on_ranks", workers.run)


@pytest.mark.parametrize(
    "parts",
    [[], pytest.param(["memory=ngram", "mtp=none", "balancing=sequence_aux"], marks=pytest.mark.slow)],
    ids=str,
)
def test_the_shipped_parts_work_over_ranks(by_workers: None, parts: list[str]) -> None:
    check_parallel(*parts)


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ("dispatch._target_={}.Dropping", "parallel=sharded on 2 ranks: the gradient of .* differs"),
        ("dispatch._target_={}.WithoutGateGradient", "parallel=experts on 2 ranks: the gradient of .* differs"),
        ("objective._target_={}.OwnMean", "parallel=sharded on 2 ranks: the gradient of .* never means"),
    ],
)
def test_parts_that_are_wrong_over_ranks_are_found(by_workers: None, part: str, words: str) -> None:
    dispatch = () if part.startswith("objective") else ("dispatch=all_to_all",)
    with pytest.raises(AssertionError, match=words):
        check_parallel(*dispatch, part.format(__name__))


@pytest.mark.slow
def test_ranks_of_their_own_say_what_failed_first() -> None:
    """In processes that are started for it, also for a class that only this function knows."""

    class Local(WithoutGateGradient):
        pass

    with pytest.raises(AssertionError, match=r"on rank \d of 4: 4 ranks of one node, .*gradient of gates_NK"):
        check_dispatch(lambda: Local(pad_multiple=1))


@pytest.mark.slow
@pytest.mark.parametrize("outcome", ["waits", "ends"])
def test_ranks_that_never_finish_are_named(outcome: str) -> None:
    assert on_ranks(rank, ranks=2) == [0, 1]
    with pytest.raises(AssertionError, match=r"on rank|did not finish"):
        on_ranks(_failing, outcome, ranks=2, seconds=20.0)


def _failing(outcome: str) -> None:
    if rank() == 0 and outcome == "ends":
        os._exit(3)
    if rank() == 1:
        dist.barrier()
        dist.barrier()


@pytest.mark.slow
def test_the_checks_start_ranks_of_their_own() -> None:
    check_dispatch(lambda: AllToAllDispatch(pad_multiple=1))
    check_parallel("recompute=[norm]")
