"""Communication of expert parallelism between nodes, in bytes per token.

A token that several experts of one node want is sent there once, and spread inside the node over faster links
(report, section 3.2.2). So one MoE layer sends d numbers to each node reached, and gets d numbers back:

    nodes reached * d * (dispatch + combine)

and the backward pass the same again, gradients taking the way back. Experts stand in order, on GPUs and in groups
alike; a router that keeps M of G groups reaches M nodes at most where a group is a node, and never more than K.

`at_most` takes every node reached for another than the token's own. `expected` is the mean where every choice
of groups, and of K experts in them, is as likely as any other, and leaves out the token's own node.
"""

from collections import Counter
from collections.abc import Sequence
from math import comb
from typing import NamedTuple

from dsv3.planning.recipe import Recipe
from dsv3.planning.skeleton import Skeleton


class Traffic(NamedTuple):
    nodes_at_most: int
    nodes_expected: float  # the token's own among them
    bytes_at_most: float  # forward, one MoE layer
    bytes_expected: float


def all_to_all(s: Skeleton, r: Recipe, *, limited: bool) -> Traffic:
    """One MoE layer's traffic; `limited` False: as if the router chose among all experts freely."""
    groups, kept = (s.n_groups, s.topk_groups) if limited else (1, 1)
    held_NG = _experts_of_nodes(s, r, groups)
    spans = sorted((sum(held_G[g] > 0 for held_G in held_NG) for g in range(groups)), reverse=True)
    at_most = min(len(held_NG), s.top_k, sum(spans[:kept]))
    pool = s.n_experts // groups * kept
    expected = sum(1 - _missed(held_G, kept, pool, s.top_k) for held_G in held_NG)
    elsewhere = 1 - 1 / len(held_NG)
    per_node = s.dim * (r.formats.dispatch + r.formats.combine)
    return Traffic(at_most, expected, at_most * per_node if elsewhere else 0, expected * elsewhere * per_node)


def _experts_of_nodes(s: Skeleton, r: Recipe, groups: int) -> list[list[int]]:
    """[node][group]: how many experts they share."""
    nodes = -(-r.ep // r.gpus_per_node)
    held_NG = [[0] * groups for _ in range(nodes)]
    for expert in range(s.n_experts):
        gpu = expert * r.ep // s.n_experts
        held_NG[gpu // r.gpus_per_node][expert * groups // s.n_experts] += 1
    return held_NG


def _missed(held_G: Sequence[int], kept: int, pool: int, top_k: int) -> float:
    """Probability that none of a token's experts is on the node that holds `held_G` experts of each group."""
    ways = Counter({(0, 0): 1})  # (groups kept, experts held in them) -> sets of groups
    for held in held_G:
        for (chosen, total), count in list(ways.items()):
            ways[chosen + 1, total + held] += count
    missing = sum(count * comb(pool - total, top_k) for (chosen, total), count in ways.items() if chosen == kept)
    return missing / (comb(len(held_G), kept) * comb(pool, top_k))
