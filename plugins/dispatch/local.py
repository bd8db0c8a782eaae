"""Dispatch with all experts on one device.

The M = N*K (token, expert) pairs are sorted by expert, the experts run on contiguous rows (R of them, filling
included), and each token's K rows of the results, which carry their gates already, are summed. Copying rows out and
summing them back are each other's gradient, so nothing is kept for the backward pass but indices, and there is never a
scatter-add.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsv3.bounds import PositiveInt
from dsv3.contracts import Experts, Routing
from dsv3.model.layers import on_host


class Pairs(NamedTuple):
    """The M pairs of a row and an expert that it goes to, row by row."""

    row_M: Tensor  # int64
    expert_M: Tensor  # int64
    gate_M: Tensor  # float32
    firsts_N: Tensor  # int64, the first pair of each row


class CopyRows(torch.autograd.Function):
    """rows_RD = x_ND[row_R]; `places_M` says where the copies went, those of row n from firsts_N[n] on."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, row_R: Tensor, places_M: Tensor, firsts_N: Tensor) -> Tensor:
        ctx.save_for_backward(places_M, firsts_N)
        return x_ND.index_select(0, row_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return summed(grads[0], *ctx.saved_tensors), None, None, None


class SumRows(torch.autograd.Function):
    """y_ND = the sum of each row's rows at places_M; row r belongs to row_R[r]."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, row_R: Tensor, places_M: Tensor, firsts_N: Tensor) -> Tensor:
        ctx.save_for_backward(row_R)
        return summed(rows_RD, places_M, firsts_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (row_R,) = ctx.saved_tensors
        return grads[0].index_select(0, row_R), None, None, None


def summed(rows_RD: Tensor, places_M: Tensor, firsts_N: Tensor) -> Tensor:
    """The sum of rows_RD[places_M] over each row's pairs; one kernel reads the rows and writes the sums."""
    return torch.nn.functional.embedding_bag(places_M, rows_RD.contiguous(), firsts_N, mode="sum")


def counts(expert_M: Tensor, n_experts: int) -> Tensor:
    """How many pairs chose each expert, int64 [E]; `bincount` would wait for the device."""
    counts_E = torch.zeros(n_experts, dtype=torch.int64, device=expert_M.device)
    return counts_E.scatter_add_(0, expert_M, torch.ones_like(expert_M))


class LocalDispatch:
    """Tokens to experts and back on one device; no token is dropped.

    pad_multiple: on a CPU, pads each expert's tokens to a multiple of it with copies of the last one at gate 0. They
        change no result and no gradient, nor the scales that an expert's tokens share in FP8. There the BF16 GEMM
        (oneDNN) compiles a kernel for every new number of rows, at about a third of a millisecond: with loads that
        change at every step that takes as long as the step. A GPU's needs no padding, and the number of rows would have
        to be known on the host: each layer would wait for the device.
    """

    def __init__(self, *, pad_multiple: PositiveInt) -> None:
        if pad_multiple < 1:
            raise ValueError(f"dispatch.pad_multiple={pad_multiple}: must be at least 1")
        self.pad_multiple = pad_multiple

    def __call__(self, x_ND: Tensor, routing: Routing, experts: Experts) -> Tensor:
        n_experts = routing.affinities_NE.shape[1]
        top_k = routing.experts_NK.shape[1]
        if not torch.is_grad_enabled() and routing.experts_NK.numel() <= n_experts:
            return self.few(x_ND, routing, experts)
        pair_M = torch.arange(routing.experts_NK.numel(), device=x_ND.device)
        row_M = pair_M.div(top_k, rounding_mode="floor")
        pairs = Pairs(row_M, routing.experts_NK.flatten(), routing.gates_NK.flatten(), pair_M[::top_k])
        return self.applied(x_ND, pairs, n_experts, experts)

    def applied(self, x_ND: Tensor, pairs: Pairs, n_experts: int, experts: Experts) -> Tensor:
        """Each row's experts applied to it, times their gates, and summed, [N, D]."""
        counts_E, places_M, rows = self.layout(pairs.expert_M, n_experts)
        row_R = places_M.new_zeros(rows).scatter_(0, places_M, pairs.row_M)
        if rows > len(pairs.row_M):
            row_R = row_R[places_M.new_zeros(rows).scatter_(0, places_M, places_M).cummax(0).values]
        gates_R = pairs.gate_M.new_zeros(rows).scatter(0, places_M, pairs.gate_M)
        rows_RD = CopyRows.apply(x_ND, row_R, places_M, pairs.firsts_N)
        return SumRows.apply(experts(rows_RD, counts_E, gates_R), row_R, places_M, pairs.firsts_N)

    def few(self, x_ND: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """The same for no more pairs than there are experts, as in decoding: nothing filled up or kept."""
        expert_M, places_M = routing.experts_NK.flatten(), torch.empty_like(routing.experts_NK).flatten()
        top_k = routing.experts_NK.shape[1]
        order_M = expert_M.argsort(stable=True)
        places_M[order_M] = torch.arange(len(order_M), device=order_M.device)
        rows_MD = x_ND.index_select(0, order_M.div(top_k, rounding_mode="floor"))
        gates_M = routing.gates_NK.flatten().index_select(0, order_M)
        counts_E = counts(expert_M, routing.affinities_NE.shape[1])
        firsts_N = torch.arange(0, len(order_M), top_k, device=order_M.device)
        return summed(experts(rows_MD, counts_E, gates_M), places_M, firsts_N)

    def layout(self, expert_M: Tensor, n_experts: int) -> tuple[Tensor, Tensor, int]:
        """Rows of each expert, int64 [E], filled up; the place of each pair among them, int64 [M]; their sum."""
        multiple = self.pad_multiple if expert_M.device.type == "cpu" else 1
        order_M = expert_M.argsort(stable=True)
        load_E = counts(expert_M, n_experts)
        counts_E = (load_E + multiple - 1).div(multiple, rounding_mode="floor") * multiple
        filling_before_E = (counts_E - load_E).cumsum(0) - (counts_E - load_E)
        places_M = torch.empty_like(order_M)
        places_M[order_M] = torch.arange(len(order_M), device=order_M.device) + filling_before_E[expert_M[order_M]]
        rows = len(order_M) if multiple == 1 else on_host(counts_E.sum())
        return counts_E, places_M, rows
