"""Rows and bytes that dispatch=all_to_all sends between nodes, counted where they leave, against the plan."""

from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import dsv3.distributed.exchange as exchanging
from dsv3.contracts import Routing
from dsv3.planning.communication import all_to_all
from dsv3.planning.recipe import FORMATS, REPORT
from dsv3.planning.skeleton import Skeleton
from dsv3.testing.matrix_experts import MatrixExperts
from plugins.dispatch.all_to_all import AllToAllDispatch
from tests.distributed.workers import Workers
from tests.planning.models import skeleton

RANKS, DIM = 4, 6
TOKENS = 24_000  # of each rank: the mean over all is known to 0.2%
SHAPES = {
    "4 groups, 2 kept, top-4": {"n_experts": 16, "top_k": 4, "n_groups": 4, "topk_groups": 2},
    "4 groups, 1 kept, top-2": {"n_experts": 16, "top_k": 2, "n_groups": 4, "topk_groups": 1},
    "8 groups, 4 kept, top-8": {"n_experts": 64, "top_k": 8, "n_groups": 8, "topk_groups": 4},
}


class Sent(NamedTuple):
    """By one rank to other nodes."""

    rows: int  # of states
    bytes: int  # of these
    beside: int  # bytes of expert numbers, and of gates and their gradients

    def __add__(self, other: Any) -> "Sent":
        return Sent(*(mine + more for mine, more in zip(self, other, strict=True)))


class Counted(NamedTuple):
    """By one rank, in a forward and a backward pass, and what its routing asks for."""

    forward: Sent
    backward: Sent
    nodes: int  # other ones that its tokens reach, summed over tokens
    experts: int  # on other nodes, summed over tokens


def routing_of(s: Skeleton, *, limited: bool, seed: int) -> Routing:
    """Every choice of groups, and of experts in them, is as likely as any other."""
    generator = torch.Generator().manual_seed(seed)
    groups, kept = (s.n_groups, s.topk_groups) if limited else (1, 1)
    kept_NM = torch.rand(TOKENS, groups, generator=generator).topk(kept).indices
    is_kept_NG = torch.zeros(TOKENS, groups).scatter_(1, kept_NM, 1.0)
    affinities_NE = torch.rand(TOKENS, s.n_experts, generator=generator) + 0.1
    affinities_NE = affinities_NE * is_kept_NG.repeat_interleave(s.n_experts // groups, 1)
    gates_NK, experts_NK = affinities_NE.topk(s.top_k)
    return Routing(experts_NK, gates_NK.requires_grad_(), affinities_NE)


def counted(s: Skeleton, limited: bool, nodes: int) -> Counted:
    """One layer's passes on this rank, of RANKS on `nodes`, the experts in order over the ranks."""
    local = RANKS // nodes
    mesh = init_device_mesh("cpu", (nodes, local), mesh_dim_names=("nodes", "local"))
    dispatch = AllToAllDispatch(pad_multiple=1)
    dispatch.connect(mesh["nodes"].get_group(), mesh["local"].get_group())
    rank, node = dist.get_rank(), dist.get_rank() // local
    routing = routing_of(s, limited=limited, seed=rank)
    x_ND = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(rank)).requires_grad_()
    experts = MatrixExperts(torch.randn(s.n_experts // RANKS, DIM, DIM))
    total, exchanged = Sent(0, 0, 0), exchanging._exchanged

    def counting(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
        nonlocal total
        there = [dist.get_global_rank(group, peer) // local for peer in range(len(sent))]
        leaving = sum(count for count, other in zip(sent, there, strict=True) if other != node)
        size = leaving * rows.shape[1] * rows.element_size()
        total += (leaving, size, 0) if rows.shape[1] == DIM else (0, 0, size)
        return exchanged(rows, sent, received, group)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(exchanging, "_exchanged", counting)
        y_ND = dispatch(x_ND, routing, experts)
        forward, total = total, Sent(0, 0, 0)
        y_ND.backward(torch.ones_like(y_ND))
    node_NK = routing.experts_NK // (s.n_experts // nodes)
    reached = sum(int((node_NK == other).any(1).sum()) for other in range(nodes) if other != node)
    return Counted(forward, total, reached, int((node_NK != node).sum()))


@pytest.mark.parametrize("nodes", [2, 4])
@pytest.mark.parametrize("limited", [True, False], ids=["limited", "free"])
@pytest.mark.parametrize("shape", SHAPES)
def test_between_nodes_as_much_is_sent_as_planned(workers: Workers, shape: str, limited: bool, nodes: int) -> None:
    s = replace(skeleton("model=tiny"), dim=DIM, **SHAPES[shape])
    r = replace(REPORT, ep=RANKS, gpus_per_node=RANKS // nodes, formats=FORMATS["fp32"])
    planned = all_to_all(s, r, limited=limited)
    found = workers.run(counted, s, limited, nodes)
    forward, backward = (sum((getattr(rank, way) for rank in found), Sent(0, 0, 0)) for way in ("forward", "backward"))
    assert forward.rows == 2 * sum(rank.nodes for rank in found), "out and back, once for a node"
    assert (backward.rows, backward.bytes) == (forward.rows, forward.bytes)
    number, gate = 8, 4  # bytes of each of a token's K, which the plan leaves out
    assert forward.beside == forward.rows // 2 * s.top_k * (number + gate)
    assert backward.beside == backward.rows // 2 * s.top_k * gate
    tokens, elsewhere = RANKS * TOKENS, planned.nodes_expected * (1 - 1 / nodes)
    assert forward.rows / tokens == pytest.approx(2 * elsewhere, rel=0.01)
    assert forward.bytes / tokens == pytest.approx(planned.bytes_expected, rel=0.01)
    without = 2 * sum(rank.experts for rank in found)
    assert forward.rows < without, "fewer than if each expert on another node had a row of its own"
