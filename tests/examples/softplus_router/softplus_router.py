"""A router of one's own: softplus affinities, top-k, gates normalised over the chosen. Lives outside the project."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.contracts import Routing
from dsv3.model.layers import FixedDtype


class SoftplusRouter(FixedDtype):
    """s_i = softplus(u . e_i); top-k of s_i + b_i; g_i = s_i / sum of the chosen s, times `route_scale`.

    Unlike a sigmoid, a softplus does not saturate: a strongly preferred expert may have any share of the gate.
    """

    def __init__(self, *, dim: int, n_experts: int, top_k: int, route_scale: float) -> None:
        super().__init__()
        if not 1 <= top_k <= n_experts:
            raise ValueError(f"router.top_k={top_k}: between 1 and router.n_experts={n_experts}")
        self.top_k = top_k
        self.route_scale = route_scale
        self.weight = nn.Parameter(torch.randn(n_experts, dim) * dim**-0.5)

    def forward(self, x_ND: Tensor, bias_E: Tensor, tokens_N: Tensor) -> Routing:
        with torch.autocast(x_ND.device.type, enabled=False):  # routing is FP32 wherever the model is not
            affinities_NE = F.softplus(F.linear(x_ND.float(), self.weight))
        order_NE = (affinities_NE + bias_E).detach().sort(dim=-1, descending=True, stable=True).indices
        experts_NK = order_NE[:, : self.top_k]
        chosen_NK = affinities_NE.gather(1, experts_NK)
        gates_NK = chosen_NK / chosen_NK.sum(-1, keepdim=True) * self.route_scale
        return Routing(experts_NK, gates_NK, affinities_NE)
