"""Dispatch with the experts of a layer spread over ranks: tokens travel to their experts, and sums of outputs back.

Of the P ranks, rank p holds experts p * E/P to (p + 1) * E/P - 1. A token is sent once to a rank, however many of its
experts are there, with their gates; that rank returns the sum of its experts' outputs. Where the ranks stand on several
nodes, there are two hops: a token crosses to another node once, to the rank with the same place there, which sends it
on to the ranks of that node, and their sums come back as one (report section 3.2.2). No token is dropped, and there is
no capacity. The gradient goes the same ways backwards.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from dsv3.bounds import PositiveInt
from dsv3.contracts import Experts, Routing
from dsv3.distributed.exchange import exchange, exchanged_counts
from dsv3.model.layers import on_host
from plugins.dispatch.local import CopyRows, LocalDispatch, Pairs, SumRows

Apply = Callable[["Tokens"], Tensor]
"""Tokens -> the sum of their chosen experts' outputs times gates, [N, D]."""


class Tokens(NamedTuple):
    """Tokens with the experts, among those that can be reached from here, that they go to."""

    x_ND: Tensor
    experts_NK: Tensor  # int64, counted from the first that can be reached; -1: none
    gates_NK: Tensor  # float32


class AllToAllDispatch:
    """Tokens to experts of other ranks and back; without `connect`, as `LocalDispatch`.

    pad_multiple: as in `LocalDispatch`.
    """

    def __init__(self, *, pad_multiple: PositiveInt) -> None:
        self.local = LocalDispatch(pad_multiple=pad_multiple)
        self.hops: list[ProcessGroup] = []

    def connect(self, nodes: ProcessGroup, local: ProcessGroup) -> None:
        """Spread the experts over the ranks of a node, `local`, and over nodes, by one rank of each of `nodes`."""
        self.hops = [group for group in (nodes, local) if group.size() > 1]

    def __call__(self, x_ND: Tensor, routing: Routing, experts: Experts) -> Tensor:
        if not self.hops:
            return self.local(x_ND, routing, experts)
        tokens = Tokens(x_ND, routing.experts_NK, routing.gates_NK)
        return self._applied(tokens, self.hops, routing.affinities_NE.shape[1], experts)

    def _applied(self, tokens: Tokens, hops: list[ProcessGroup], n_experts: int, experts: Experts) -> Tensor:
        """`n_experts`: that can be reached from here by `hops`."""
        if not hops:
            return self._at_home(tokens, n_experts, experts)
        each = n_experts // hops[0].size()
        return hop(tokens, each, hops[0], lambda arrived: self._applied(arrived, hops[1:], each, experts))

    def _at_home(self, tokens: Tokens, n_experts: int, experts: Experts) -> Tensor:
        is_pair_NK = tokens.experts_NK >= 0
        row_M, place_M = is_pair_NK.nonzero(as_tuple=True)
        ends_N = is_pair_NK.sum(1).cumsum(0)
        firsts_N = torch.cat([ends_N.new_zeros(1), ends_N])[:-1]
        pairs = Pairs(row_M, tokens.experts_NK[row_M, place_M], tokens.gates_NK[row_M, place_M], firsts_N)
        return self.local.applied(tokens.x_ND, pairs, n_experts, experts)


def hop(tokens: Tokens, each: int, group: ProcessGroup, apply: Apply) -> Tensor:
    """Send each token once to every rank of `group` that has one of its experts, `apply` there, and sum what returns.

    each: experts that can be reached from each rank.
    """
    peers = group.size()
    peer_NK = tokens.experts_NK.div(each, rounding_mode="floor")  # -1 stays -1
    is_sent_PN = (peer_NK == torch.arange(peers, device=peer_NK.device).view(-1, 1, 1)).any(-1)
    sent_P = is_sent_PN.sum(1)
    sent, received = on_host(torch.stack([sent_P, exchanged_counts(sent_P, group)]))
    peer_S, token_S = is_sent_PN.nonzero(as_tuple=True)  # sorted by peer
    is_there_SK = peer_NK[token_S] == peer_S.unsqueeze(1)
    experts_SK = (tokens.experts_NK[token_S] - peer_S.unsqueeze(1) * each).masked_fill(~is_there_SK, -1)
    places_S = (is_sent_PN.flatten().cumsum(0) - 1).view_as(is_sent_PN).T[is_sent_PN.T]  # sorted by token
    firsts_N = is_sent_PN.sum(0).cumsum(0) - is_sent_PN.sum(0)
    x_SD = CopyRows.apply(tokens.x_ND, token_S, places_S, firsts_N)
    gates_SK = tokens.gates_NK.index_select(0, token_S)
    arrived = Tokens(*(exchange(rows, sent, received, group) for rows in (x_SD, experts_SK, gates_SK)))
    y_SD = exchange(apply(arrived), received, sent, group)
    y_ND: Tensor = SumRows.apply(y_SD, token_S, places_S, firsts_N)
    return y_ND
