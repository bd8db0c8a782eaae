"""Nodes that a token reaches: against enumeration of every choice, and against the router itself."""

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dsv3.planning.communication import all_to_all
from dsv3.planning.recipe import REPORT, Recipe
from dsv3.planning.skeleton import Skeleton
from tests.planning.models import config, skeleton


def every_choice(s: Skeleton, r: Recipe) -> list[int]:
    """Nodes reached by each set of K experts in each set of groups that a router may keep."""
    reached = []
    for kept in combinations(range(s.n_groups), s.topk_groups):
        pool = [e for e in range(s.n_experts) if e // (s.n_experts // s.n_groups) in kept]
        for chosen in combinations(pool, s.top_k):
            gpus = [e // (s.n_experts // r.ep) for e in chosen]
            reached.append(len({gpu // r.gpus_per_node for gpu in gpus}))
    return reached


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_nodes_equal_enumeration(data: st.DataObject) -> None:
    """Groups narrower than a node, as wide, wider, and across its edges; nodes that are not full."""
    experts = data.draw(st.sampled_from([4, 8, 12]))
    divisors = [n for n in range(1, experts + 1) if experts % n == 0]
    groups, ep = data.draw(st.sampled_from(divisors)), data.draw(st.sampled_from(divisors))
    kept, per_node = data.draw(st.integers(1, groups)), data.draw(st.integers(1, 4))
    top_k = data.draw(st.integers(1, min(4, experts // groups * kept)))
    s = replace(skeleton("model=tiny"), n_experts=experts, top_k=top_k, n_groups=groups, topk_groups=kept)
    r = replace(REPORT, ep=ep, gpus_per_node=per_node)
    reached, planned = every_choice(s, r), all_to_all(s, r, limited=True)
    assert planned.nodes_expected == pytest.approx(sum(reached) / len(reached))
    assert planned.nodes_at_most >= max(reached)
    assume(groups % -(-ep // per_node) == 0 and ep % per_node == 0)  # a group within a node
    assert planned.nodes_at_most == min(kept, top_k, ep // per_node)


def test_report_limits_tokens_to_four_of_eight_nodes() -> None:
    """7168 numbers to each node, a byte each; two bytes each on the way back."""
    s = skeleton("model=v3_671b")
    limited, unlimited = (all_to_all(s, REPORT, limited=limit) for limit in (True, False))
    assert (limited.nodes_at_most, limited.bytes_at_most) == (4, 4 * 7168 * 3)
    assert (unlimited.nodes_at_most, unlimited.bytes_at_most) == (8, 8 * 7168 * 3)
    assert limited.bytes_expected == pytest.approx(limited.nodes_expected * 7 / 8 * 7168 * 3)


def test_the_router_reaches_as_many_nodes_as_planned() -> None:
    """DeepSeek-V3's router on random affinities: never more than 4 nodes, and near the mean of a uniform choice."""
    router = instantiate(config("model=v3_671b", "model.dim=16").router)()
    torch.nn.init.normal_(router.weight)
    x_ND = torch.randn(4000, 16, generator=torch.Generator().manual_seed(1))
    experts_NK = router(x_ND, torch.zeros(256), torch.zeros(4000).long()).experts_NK
    reached_N = torch.tensor([len(set(row)) for row in (experts_NK // 32).tolist()]).float()
    planned = all_to_all(skeleton("model=v3_671b"), REPORT, limited=True)
    assert reached_N.max() == planned.nodes_at_most
    assert reached_N.mean().item() == pytest.approx(planned.nodes_expected, rel=0.1)


def test_one_node_sends_nothing() -> None:
    traffic = all_to_all(skeleton("model=v3_671b"), replace(REPORT, ep=8), limited=True)
    assert (traffic.bytes_at_most, traffic.bytes_expected) == (0, 0)
