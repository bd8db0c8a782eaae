"""Does a dispatch with `connect` take tokens to the experts of other ranks, and their gradients back?"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from dsv3.contracts import Routing
from dsv3.testing.matrix_experts import DIM, ROUNDING, MatrixExperts, expected_sum
from dsv3.testing.plain import error
from dsv3.testing.requirement import require

RANKS = 4
NODES = {"4 ranks of one node": 1, "2 nodes of 2 ranks": 2, "4 nodes of one rank": 4}
EXPERTS, TOP_K = 8, 3


class Share(NamedTuple):
    """A rank's tokens."""

    x_ND: Tensor
    routing: Routing
    upstream_ND: Tensor  # gradient of the output


def check_connected(factory: Callable[[], Any]) -> None:
    """Raise AssertionError, saying what is wrong; every one of RANKS ranks must call this."""
    for name, nodes in NODES.items():
        mesh = init_device_mesh("cpu", (nodes, RANKS // nodes), mesh_dim_names=("nodes", "local"))
        dispatch = factory()
        dispatch.connect(mesh["nodes"].get_group(), mesh["local"].get_group())
        for case, shares in _cases().items():
            _check(dispatch, shares, f"{name}, {case}")


def _cases() -> dict[str, list[Share]]:
    """Of each rank, by what they try. All ranks draw all of them alike."""
    generator = torch.Generator().manual_seed(0)

    def share(experts_NK: Tensor) -> Share:
        n = len(experts_NK)
        gates_NK = torch.rand(n, TOP_K, generator=generator)
        routing = Routing(experts_NK, gates_NK, torch.rand(n, EXPERTS, generator=generator))
        x_ND, upstream_ND = torch.randn(2, n, DIM, generator=generator)
        return Share(x_ND, routing, upstream_ND)

    def spread(n: int) -> Tensor:
        return torch.rand(n, EXPERTS, generator=generator).topk(TOP_K).indices

    same_NK = torch.tensor([[6, 0, 7]]).expand(20, TOP_K).contiguous()
    return {
        "as many tokens on every rank": [share(spread(20)) for _ in range(RANKS)],
        "other numbers of tokens on every rank": [share(spread(1 + 9 * rank)) for rank in range(RANKS)],
        "ranks whose experts no token chose": [share(same_NK) for _ in range(RANKS)],
    }


def _check(dispatch: Any, shares: list[Share], name: str) -> None:
    rank, each = dist.get_rank(), EXPERTS // RANKS
    all_EDD = torch.randn(EXPERTS, DIM, DIM, generator=torch.Generator().manual_seed(1))
    own = slice(rank * each, (rank + 1) * each)
    exact_EDD = all_EDD.double().requires_grad_()
    exact = [_leaves(share, torch.float64) for share in shares]
    sums = [expected_sum(share.x_ND, share.routing, exact_EDD) for share in exact]
    right = torch.autograd.grad(
        sums, [exact[rank].x_ND, exact[rank].routing.gates_NK, exact_EDD], [share.upstream_ND for share in exact]
    )

    experts, share = MatrixExperts(all_EDD[own]), _leaves(shares[rank], torch.float32)
    with torch.no_grad():
        found = {"without gradients": dispatch(share.x_ND, share.routing, experts)}
    y_ND = found["with gradients"] = dispatch(share.x_ND, share.routing, experts)
    for when, output_ND in found.items():
        require(
            output_ND.shape == share.x_ND.shape and error(output_ND, sums[rank]) <= ROUNDING,
            f"{name}, {when}: the output must be the sum over a token's K experts of gate * expert(x), wherever they "
            "are: rank r of R has experts r * E / R up to the next one's, ranks of a node following each other. No "
            "token is dropped, and no expert's gate is lost or applied twice",
        )
    leaves = {"the input": share.x_ND, "gates_NK": share.routing.gates_NK, "the experts' weights": experts.weight_EDD}
    require(y_ND.requires_grad, f"{name}: the output must carry a gradient")
    gradients = torch.autograd.grad(y_ND, list(leaves.values()), share.upstream_ND, allow_unused=True)
    for leaf, gradient, expected in zip(leaves, gradients, [*right[:2], right[2][own]], strict=True):
        gradient = torch.zeros_like(expected) if gradient is None else gradient
        require(
            error(gradient, expected) <= ROUNDING,
            f"{name}: the gradient of {leaf} must be that of the sum over k of gate * expert(x); the experts' is of "
            "the tokens of all ranks",
        )


def _leaves(share: Share, dtype: torch.dtype) -> Share:
    gates_NK = share.routing.gates_NK.to(dtype, copy=True).requires_grad_()
    x_ND = share.x_ND.to(dtype, copy=True).requires_grad_()
    return Share(x_ND, share.routing._replace(gates_NK=gates_NK), share.upstream_ND.to(dtype))
