"""DeepSeek-V3's router (report eq. 12-16, and the published gate).

    s_i = sigmoid(u . e_i)                                        affinity of a token u for expert i
    chosen: the top_k of s_i + b_i among the experts of the topk_groups best groups
    g_i = route_scale * s_i / (sum of the chosen s + 1e-20)       the bias b is in no gate

A group's score is the sum of its `group_score_top` highest affinities, biased or raw. The published code takes
the highest 2; the report K_r / M (top_k / topk_groups), which is 2 at 671B.
"""

from torch import Tensor

from dsv3.bounds import PositiveFloat, PositiveInt
from dsv3.contracts import Routing
from plugins.router.base import FP32Projection, check_groups, keep_groups, top


class SigmoidGroupLimitedRouter(FP32Projection):
    """x_ND in any float dtype -> Routing in FP32; see the module.

    dim: width of a token. n_experts, top_k: E and K.
    n_groups: equal groups ("nodes") of neighbouring experts; 1 is no grouping.
    topk_groups: groups that a token may use.
    group_score_top: affinities summed for a group's score; None is top_k // topk_groups, at least 1.
    route_scale: factor on the normalised gates (1 in the report, 2.5 for the published weights).
    biased_groups: score groups with s + b (published code) or with s (report).

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
        group_score_top: PositiveInt | None,
        route_scale: PositiveFloat,
        biased_groups: bool,
    ) -> None:
        super().__init__(dim=dim, n_experts=n_experts, top_k=top_k)
        check_groups(n_experts=n_experts, top_k=top_k, n_groups=n_groups, topk_groups=topk_groups)
        summed = max(1, top_k // topk_groups) if group_score_top is None else group_score_top
        if not 1 <= summed <= n_experts // n_groups:
            raise ValueError(f"group_score_top={summed}: must be at most {n_experts // n_groups}, a group's size")
        self.n_groups = n_groups
        self.topk_groups = topk_groups
        self.group_score_top = summed
        self.route_scale = route_scale
        self.biased_groups = biased_groups

    def forward(self, x_ND: Tensor, bias_E: Tensor, tokens_N: Tensor) -> Routing:
        affinities_NE = self.logits(x_ND).sigmoid()
        experts_NK = self.select(affinities_NE.detach(), bias_E)
        return Routing(experts_NK, self.gates(affinities_NE, experts_NK), affinities_NE)

    def gates(self, affinities_NE: Tensor, experts_NK: Tensor) -> Tensor:
        """Of these experts, float32 [N, K]."""
        chosen_NK = affinities_NE.gather(1, experts_NK)
        return chosen_NK / (chosen_NK.sum(-1, keepdim=True) + 1e-20) * self.route_scale

    def select(self, affinities_NE: Tensor, bias_E: Tensor) -> Tensor:
        """Indices of the chosen experts, int64 [N, K]."""
        choice_NE = affinities_NE + bias_E
        if self.n_groups > 1:
            scored_NE = choice_NE if self.biased_groups else affinities_NE
            best = scored_NE.unflatten(1, (self.n_groups, -1)).topk(self.group_score_top, dim=-1).values
            choice_NE = keep_groups(choice_NE, best.sum(-1), self.topk_groups)
        return top(choice_NE, self.top_k)
