"""DeepSeek-V2's router (arXiv 2405.04434, section 2.1.2): softmax affinities, greedy or group-limited top-k.

    s = softmax(u . e)                                            over all experts
    chosen: the top_k of s_i + b_i among the experts of the topk_groups best groups
    g_i = route_scale * s_i                                       the bias b is in no gate

A group's score is its highest s_i + b_i. V2 has no bias (b = 0); V2-Lite has one group. Normalised gates are
divided by the sum of the chosen s + 1e-20 before the scale.
"""

from torch import Tensor

from dsv3.bounds import PositiveFloat, PositiveInt
from dsv3.contracts import Routing
from plugins.router.base import FP32Projection, check_groups, keep_groups, top


class SoftmaxRouter(FP32Projection):
    """x_ND in any float dtype -> Routing in FP32; see the module.

    dim: width of a token. n_experts, top_k: E and K.
    n_groups: equal groups of neighbouring experts; 1 is no grouping (V2-Lite).
    topk_groups: groups that a token may use.
    route_scale: factor on the gates (1 in V2-Lite, 16 in V2).
    normalise_gates: make the chosen gates sum to route_scale.

    Raises ValueError where the groups kept hold fewer than top_k experts.
    """

    def __init__(
        self,
        *,
        dim: PositiveInt,
        n_experts: PositiveInt,
        top_k: PositiveInt,
        n_groups: PositiveInt,
        topk_groups: PositiveInt,
        route_scale: PositiveFloat,
        normalise_gates: bool,
    ) -> None:
        super().__init__(dim=dim, n_experts=n_experts, top_k=top_k)
        check_groups(n_experts=n_experts, top_k=top_k, n_groups=n_groups, topk_groups=topk_groups)
        self.n_groups = n_groups
        self.topk_groups = topk_groups
        self.route_scale = route_scale
        self.normalise_gates = normalise_gates

    def forward(self, x_ND: Tensor, bias_E: Tensor, tokens_N: Tensor) -> Routing:
        affinities_NE = self.logits(x_ND).softmax(-1)
        experts_NK = self.select(affinities_NE.detach(), bias_E)
        return Routing(experts_NK, self.gates(affinities_NE, experts_NK), affinities_NE)

    def gates(self, affinities_NE: Tensor, experts_NK: Tensor) -> Tensor:
        """Of these experts, float32 [N, K]."""
        gates_NK = affinities_NE.gather(1, experts_NK)
        if self.normalise_gates:
            gates_NK = gates_NK / (gates_NK.sum(-1, keepdim=True) + 1e-20)
        return gates_NK * self.route_scale

    def select(self, affinities_NE: Tensor, bias_E: Tensor) -> Tensor:
        """Indices of the chosen experts, int64 [N, K]."""
        choice_NE = affinities_NE + bias_E
        if self.n_groups > 1:
            group_scores_NG = choice_NE.unflatten(1, (self.n_groups, -1)).amax(-1)
            choice_NE = keep_groups(choice_NE, group_scores_NG, self.topk_groups)
        return top(choice_NE, self.top_k)
