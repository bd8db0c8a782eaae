"""Base of balancing methods: no-op defaults, fixed-dtype buffers, balance-loss helpers."""

import torch
from torch import Tensor

from dsv3.bounds import PositiveInt
from dsv3.contracts import Routing
from dsv3.model.layers import FixedDtype


class Unbalanced(FixedDtype):
    """No balancing: a bias of zero, no loss, no counting. The base of every method, each adding what it does.

    n_experts: E.
    """

    bias: Tensor

    def __init__(self, *, n_experts: PositiveInt) -> None:
        super().__init__()
        self.register_buffer("bias", torch.zeros(n_experts), persistent=False)

    def loss(self, routing: Routing, batch_shape: tuple[int, int], mask_BT: Tensor, tokens_seen: int) -> Tensor:
        return routing.affinities_NE.new_zeros(())

    def observe(self, counts_E: Tensor) -> None:
        """Nothing depends on the load."""

    def update(self, tokens_seen: int) -> None:
        """Nothing depends on the load."""


def normalised(affinities_NE: Tensor) -> Tensor:
    """s_i / sum_j s_j of each token (eq. 19): shares of the experts, which sum to 1; softmax scores are so already."""
    return affinities_NE / (affinities_NE.sum(-1, keepdim=True) + 1e-20)


def load_product(chosen_BTK: Tensor, shares_BTE: Tensor, mask_BT: Tensor) -> Tensor:
    """sum_i f_i P_i of each row (eq. 17-20), float32 [B]; 0 for a row of padding, 1 where the load is balanced.

    f_i = E / (K T) * (how many of the row's T real tokens chose expert i)
    P_i = mean over them of shares_i; only P has a gradient.
    """
    n_experts, top_k = shares_BTE.shape[-1], chosen_BTK.shape[-1]
    real_BT1 = mask_BT.unsqueeze(-1).to(shares_BTE.dtype)
    tokens_B1 = real_BT1.sum(1).clamp(min=1)
    chosen_BTE = torch.zeros_like(shares_BTE).scatter_(-1, chosen_BTK, real_BT1.expand(chosen_BTK.shape))
    f_BE = chosen_BTE.sum(1) * (n_experts / top_k) / tokens_B1
    p_BE = (shares_BTE * real_BT1).sum(1) / tokens_B1
    return (f_BE * p_BE).sum(-1)
