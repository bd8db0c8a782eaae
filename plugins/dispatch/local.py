"""Dispatch where every expert is on this device.

The M = N*K (token, expert) pairs are sorted by expert, the experts run on contiguous rows, and each token's K rows of
the results, which carry their gates already, are summed. Copying rows out and summing them back are each other's
gradient, so nothing is kept for the backward pass but indices, and there is never a scatter-add.
"""

from typing import Any

import torch
from torch import Tensor

from dsv3.contracts import Experts, Routing
from dsv3.layers import run


class _Copy(torch.autograd.Function):
    """rows_MD = x_ND[token_M]; `places_NK` says where the K copies of each token went."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, token_M: Tensor, places_NK: Tensor) -> Tensor:
        ctx.save_for_backward(places_NK)
        return x_ND.index_select(0, token_M)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (places_NK,) = ctx.saved_tensors
        return summed(grads[0], places_NK), None, None


class _Sum(torch.autograd.Function):
    """y_ND = the sum of the rows at places_NK; row m went to token token_M[m]."""

    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, token_M: Tensor, places_NK: Tensor) -> Tensor:
        ctx.save_for_backward(token_M)
        return summed(rows_MD, places_NK)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (token_M,) = ctx.saved_tensors
        return grads[0].index_select(0, token_M), None, None


def summed(rows_MD: Tensor, places_NK: Tensor) -> Tensor:
    """sum_k rows_MD[places_NK[:, k]]; one kernel reads the rows and writes the sums."""
    return torch.nn.functional.embedding_bag(places_NK, rows_MD.contiguous(), mode="sum")


class LocalDispatch:
    """Tokens to experts and back on one device; no token is dropped."""

    def __call__(self, x_ND: Tensor, routing: Routing, experts: Experts) -> Tensor:
        n_experts, top_k = routing.affinities_NE.shape[1], routing.experts_NK.shape[1]
        expert_M = routing.experts_NK.flatten()
        order_M = expert_M.argsort(stable=True)
        places_M = torch.empty_like(order_M)
        places_M[order_M] = torch.arange(order_M.numel(), device=order_M.device)
        token_M = order_M.div(top_k, rounding_mode="floor")
        places_NK = places_M.view_as(routing.experts_NK)
        counts_E = torch.bincount(expert_M, minlength=n_experts)
        gates_M = routing.gates_NK.flatten().index_select(0, order_M)
        rows_MD = run(_Copy, x_ND, token_M, places_NK)
        y_ND: Tensor = run(_Sum, experts(rows_MD, counts_E, gates_M), token_M, places_NK)
        return y_ND
