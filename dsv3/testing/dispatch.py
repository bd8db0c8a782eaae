"""Does a dispatch keep to `dsv3.contracts.Dispatch`?"""

from collections.abc import Callable
from typing import Any

import torch

from dsv3.contracts import Routing
from dsv3.testing.connected_dispatch import RANKS, check_connected
from dsv3.testing.matrix_experts import DIM, ROUNDING, MatrixExperts, expected_sum
from dsv3.testing.plain import error
from dsv3.testing.ranks import on_ranks
from dsv3.testing.requirement import require

EXPERTS, TOP_K = 5, 2


def check_dispatch(factory: Callable[[], Any]) -> None:
    """Raise AssertionError, saying what is wrong, unless `factory()` is a dispatch that the core can use."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        dispatch = factory()
        for name, routing in _routings().items():
            _sum(dispatch, routing, name)
            _gradients(dispatch, routing, name)
        _dtype(dispatch)
    if hasattr(dispatch, "connect"):
        on_ranks(check_connected, factory, ranks=RANKS)


def _routings() -> dict[str, Routing]:
    """By what they try: tokens spread over experts, one token, and all tokens at the same experts."""
    spread = torch.rand(40, EXPERTS).topk(TOP_K).indices
    same = torch.tensor([[3, 1]]).expand(40, TOP_K).contiguous()
    chosen = {"40 tokens": spread, "1 token": spread[:1], "40 tokens that all chose two experts": same}
    return {
        name: Routing(experts_NK, torch.rand(experts_NK.shape), torch.rand(len(experts_NK), EXPERTS))
        for name, experts_NK in chosen.items()
    }


def _sum(dispatch: Any, routing: Routing, name: str) -> None:
    experts, x_ND = MatrixExperts(torch.randn(EXPERTS, DIM, DIM)), torch.randn(len(routing.experts_NK), DIM)
    for with_gradient in (True, False):
        with torch.set_grad_enabled(with_gradient):
            y_ND = dispatch(x_ND, routing, experts)
        when = name if with_gradient else f"{name}, without gradients (validation, generation)"
        require(
            y_ND.shape == x_ND.shape and y_ND.dtype == x_ND.dtype,
            f"{when}: the output must be {x_ND.dtype} {list(x_ND.shape)}, not {y_ND.dtype} {list(y_ND.shape)}",
        )
        require(
            error(y_ND, expected_sum(x_ND, routing, experts.weight_EDD)) <= ROUNDING,
            f"{when}: the output must be the sum over a token's K experts of gate * expert(x); no token is dropped, "
            "and no expert's gate is lost or applied twice",
        )


def _gradients(dispatch: Any, routing: Routing, name: str) -> None:
    experts, x_ND = (
        MatrixExperts(torch.randn(EXPERTS, DIM, DIM)),
        torch.randn(len(routing.experts_NK), DIM, requires_grad=True),
    )
    routing = routing._replace(gates_NK=routing.gates_NK.clone().requires_grad_())
    leaves = {"the input": x_ND, "gates_NK": routing.gates_NK, "the experts' weights": experts.weight_EDD}
    upstream = torch.randn(x_ND.shape)
    y_ND = dispatch(x_ND, routing, experts)
    require(y_ND.requires_grad, f"{name}: the output must carry a gradient")
    found = torch.autograd.grad(y_ND, list(leaves.values()), upstream, allow_unused=True)
    exact = expected_sum(x_ND, routing, experts.weight_EDD)
    expected = torch.autograd.grad(exact, list(leaves.values()), upstream.double())
    for leaf, gradient, right in zip(leaves, found, expected, strict=True):
        require(gradient is not None, f"{name}: no gradient arrives at {leaf}")
        assert gradient is not None
        require(
            error(gradient, right) <= ROUNDING,
            f"{name}: the gradient of {leaf} must be that of the sum over k of gate * expert(x)",
        )


def _dtype(dispatch: Any) -> None:
    """Rows in BF16, as in training."""
    routing = _routings()["40 tokens"]
    x_ND = torch.randn(len(routing.experts_NK), DIM).bfloat16()
    y_ND = dispatch(x_ND, routing, MatrixExperts(torch.randn(EXPERTS, DIM, DIM)))
    require(y_ND.dtype == torch.bfloat16, f"the output for a bfloat16 input must be bfloat16, not {y_ND.dtype}")
