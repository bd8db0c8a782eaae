"""Dispatch with all experts on one device.

The M = N*K (token, expert) pairs are sorted by expert, the experts run on contiguous rows (R of them, filling
included), and each token's K rows of the results, which carry their gates already, are summed. Copying rows out and
summing them back are each other's gradient, so nothing is kept for the backward pass but indices, and there is never a
scatter-add.
"""

from typing import Any

import torch
from torch import Tensor

from dsv3.bounds import PositiveInt
from dsv3.contracts import Experts, Routing
from dsv3.model.layers import on_host


class _Copy(torch.autograd.Function):
    """rows_RD = x_ND[token_R]; `places_NK` says where the K copies of each token went."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_R: Tensor, places_NK: Tensor) -> Tensor:
        ctx.save_for_backward(places_NK)
        return x_ND.index_select(0, token_R)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (places_NK,) = ctx.saved_tensors
        return summed(grads[0], places_NK), None, None


class _Sum(torch.autograd.Function):
    """y_ND = the sum of the rows at places_NK; row r belongs to token token_R[r]."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, token_R: Tensor, places_NK: Tensor) -> Tensor:
        ctx.save_for_backward(token_R)
        return summed(rows_RD, places_NK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (token_R,) = ctx.saved_tensors
        return grads[0].index_select(0, token_R), None, None


def summed(rows_RD: Tensor, places_NK: Tensor) -> Tensor:
    """sum_k rows_RD[places_NK[:, k]]; one kernel reads the rows and writes the sums."""
    return torch.nn.functional.embedding_bag(places_NK, rows_RD.contiguous(), mode="sum")


def counts(expert_M: Tensor, n_experts: int) -> Tensor:
    """How many pairs chose each expert, int64 [E]; `bincount` would wait for the device."""
    counts_E = torch.zeros(n_experts, dtype=torch.int64, device=expert_M.device)
    return counts_E.scatter_add_(0, expert_M, torch.ones_like(expert_M))


class LocalDispatch:
    """Tokens to experts and back on one device; no token is dropped.

    pad_multiple: pads each expert's tokens to a multiple of it with rows of gate 0, which change no result and no
        gradient. On a CPU the BF16 GEMM (oneDNN) compiles a kernel for every new number of rows, at about a third of a
        millisecond: with loads that change at every step that takes as long as the step. The number of rows is then
        needed on the host, so that each layer waits for the device: on a GPU, 1 (no padding, no waiting).
    """

    def __init__(self, *, pad_multiple: PositiveInt) -> None:
        if pad_multiple < 1:
            raise ValueError(f"dispatch.pad_multiple={pad_multiple}: must be at least 1")
        self.pad_multiple = pad_multiple

    def __call__(self, x_ND: Tensor, routing: Routing, experts: Experts) -> Tensor:
        if not torch.is_grad_enabled() and routing.experts_NK.numel() <= routing.affinities_NE.shape[1]:
            return self.few(x_ND, routing, experts)
        counts_E, places_NK, rows = self.layout(routing)
        places_M = places_NK.flatten()
        token_M = torch.arange(places_M.numel(), device=x_ND.device).div_(places_NK.shape[1], rounding_mode="floor")
        token_R = places_M.new_zeros(rows).scatter_(0, places_M, token_M)
        gates_R = routing.gates_NK.new_zeros(rows).scatter(0, places_M, routing.gates_NK.flatten())
        rows_RD = _Copy.apply(x_ND, token_R, places_NK)
        return _Sum.apply(experts(rows_RD, counts_E, gates_R), token_R, places_NK)

    def few(self, x_ND: Tensor, routing: Routing, experts: Experts) -> Tensor:
        """The same for no more pairs than there are experts, as in decoding: nothing filled up or kept."""
        expert_M, places_NK = routing.experts_NK.flatten(), torch.empty_like(routing.experts_NK)
        order_M = expert_M.argsort(stable=True)
        places_NK.view(-1)[order_M] = torch.arange(len(order_M), device=order_M.device)
        rows_MD = x_ND.index_select(0, order_M.div(places_NK.shape[1], rounding_mode="floor"))
        gates_M = routing.gates_NK.flatten().index_select(0, order_M)
        counts_E = counts(expert_M, routing.affinities_NE.shape[1])
        return summed(experts(rows_MD, counts_E, gates_M), places_NK)

    def layout(self, routing: Routing) -> tuple[Tensor, Tensor, int]:
        """Rows of each expert, int64 [E], filled up; the place of each pair among them, int64 [N, K]; their sum."""
        expert_M = routing.experts_NK.flatten()
        order_M = expert_M.argsort(stable=True)
        load_E = counts(expert_M, routing.affinities_NE.shape[1])
        counts_E = (load_E + self.pad_multiple - 1).div(self.pad_multiple, rounding_mode="floor") * self.pad_multiple
        filling_before_E = (counts_E - load_E).cumsum(0) - (counts_E - load_E)
        places_M = torch.empty_like(order_M)
        places_M[order_M] = torch.arange(len(order_M), device=order_M.device) + filling_before_E[expert_M[order_M]]
        rows = len(order_M) if self.pad_multiple == 1 else on_host(counts_E.sum())
        return counts_E, places_M.view_as(routing.experts_NK), rows
