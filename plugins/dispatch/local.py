"""Dispatch where every expert is on this device.

The M = N*K (token, expert) pairs are sorted by expert, the experts run on contiguous rows, and the results
are put back and summed with their gates. Copies of a token are K apart in the unsorted order, so gathering
is one permutation each way; its gradient is the inverse permutation and a sum over K, never a scatter-add.
"""

from typing import Any

import torch
from torch import Tensor

from dsv3.contracts import Experts, Routing


class _Gather(torch.autograd.Function):
    """rows_MD = x_ND[order // K], where `order` sorts the pairs by expert and `inverse` puts them back."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_M: Tensor, inverse_M: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse_M)
        ctx.top_k = top_k
        return x_ND.index_select(0, order_M.div(top_k, rounding_mode="floor"))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_M,) = ctx.saved_tensors
        grad_NKD = grads[0].index_select(0, inverse_M).unflatten(0, (-1, ctx.top_k))
        return grad_NKD.sum(1), None, None, None


class _Combine(torch.autograd.Function):
    """y_ND = sum_k gates_NK * rows_MD[inverse]."""

    @staticmethod
    def forward(ctx: Any, rows_MD: Tensor, gates_NK: Tensor, order_M: Tensor, inverse_M: Tensor) -> Tensor:
        rows_NKD = rows_MD.index_select(0, inverse_M).unflatten(0, gates_NK.shape)
        ctx.save_for_backward(rows_NKD, gates_NK, order_M)
        return torch.bmm(gates_NK.to(rows_MD.dtype).unsqueeze(1), rows_NKD).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows_NKD, gates_NK, order_M = ctx.saved_tensors
        grad_ND = grads[0].contiguous()
        grad_gates_NK = torch.bmm(rows_NKD, grad_ND.unsqueeze(2)).squeeze(2).to(gates_NK.dtype)
        token_M = order_M.div(gates_NK.shape[1], rounding_mode="floor")
        gates_M1 = gates_NK.flatten().index_select(0, order_M).to(grad_ND.dtype).unsqueeze(1)
        return grad_ND.index_select(0, token_M).mul_(gates_M1), grad_gates_NK, None, None


class LocalDispatch:
    """Tokens to experts and back on one device; no token is dropped."""

    def __call__(self, x_ND: Tensor, routing: Routing, experts: Experts) -> Tensor:
        n_experts, top_k = routing.affinities_NE.shape[1], routing.experts_NK.shape[1]
        expert_M = routing.experts_NK.flatten()
        order_M = expert_M.argsort(stable=True)
        inverse_M = torch.empty_like(order_M)
        inverse_M[order_M] = torch.arange(order_M.numel(), device=order_M.device)
        counts_E = torch.bincount(expert_M, minlength=n_experts)
        rows_MD = _Gather.apply(x_ND, order_M, inverse_M, top_k)
        return _Combine.apply(experts(rows_MD, counts_E), routing.gates_NK, order_M, inverse_M)
