"""Routers without learned parameters: baselines for learned routing.

Every expert draws a number for a token by a hash, and the top_k highest win, so that each set of top_k distinct
experts is as likely as any other:
    hash:    of the token id (Roller et al. 2021, arXiv 2106.04426: a fixed random table, here for top_k >= 1)
    random:  of the token id and its row in the micro-batch
All gates are route_scale / top_k; the affinities are 1 for the chosen experts and 0 for the rest, so that measures
of balance read the load. The selection bias is ignored. Nothing advances with time: the same micro-batch
is routed alike when it is recomputed or a run is resumed. The salt, drawn from torch's generator when
the module is made, gives each layer choices of its own; it is saved with the model.

Random routing depends on where a token stands in its micro-batch, so batches cut differently (cached
decoding, for one) are routed differently.
"""

import torch
from torch import Tensor, nn

from dsv3.bounds import PositiveFloat, PositiveInt
from dsv3.contracts import Routing
from dsv3.model.layers import hashed
from plugins.router.base import top

MASK = 0xFFFFFFFF


class HashRouter(nn.Module):
    """The experts of a token follow from its id alone.

    n_experts, top_k: E and K. route_scale: the sum of a token's gates.
    """

    salt: Tensor

    def __init__(self, *, n_experts: PositiveInt, top_k: PositiveInt, route_scale: PositiveFloat) -> None:
        super().__init__()
        if not 1 <= top_k <= n_experts:
            raise ValueError(f"top_k={top_k}: must be between 1 and n_experts={n_experts}")
        self.n_experts = n_experts
        self.top_k = top_k
        self.route_scale = route_scale
        self.register_buffer("salt", torch.randint(MASK + 1, ()))

    def forward(self, x_ND: Tensor, bias_E: Tensor, tokens_N: Tensor) -> Routing:
        experts_E = torch.arange(self.n_experts, device=tokens_N.device)
        draws_NE = mix(self.keys(tokens_N).unsqueeze(1) + mix(experts_E + 1))
        experts_NK = top(draws_NE, self.top_k)
        gates_NK = x_ND.new_full(experts_NK.shape, self.route_scale / self.top_k, dtype=torch.float32)
        affinities_NE = torch.zeros_like(draws_NE, dtype=torch.float32).scatter_(1, experts_NK, 1.0)
        return Routing(experts_NK, gates_NK, affinities_NE)

    def keys(self, tokens_N: Tensor) -> Tensor:
        """What is hashed for each token, int64 below 2^32."""
        return mix(tokens_N + self.salt)


class RandomRouter(HashRouter):
    """The experts of a token follow from its id and its row: uniform for every occurrence of it."""

    def keys(self, tokens_N: Tensor) -> Tensor:
        rows_N = torch.arange(tokens_N.numel(), device=tokens_N.device)
        return mix(super().keys(tokens_N) + mix(rows_N + 1))


def mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers, held in int64, that changes about half of the bits for any change of x."""
    return hashed(x & MASK, ((16, 0x7FEB352D), (15, 0x846CA68B)), 16, mask=MASK)
