"""DeepSeekMoE (report eq. 12): shared experts for every token, K of E routed experts for each."""

import torch
from torch import Tensor, nn

from dsv3.contracts import Balancing, Dispatch, Experts, ReplaysRouting, Router, Routing


class MoE(nn.Module):
    """h' = shared(x) + sum_k g_k FFN_k(x).

    The forward pass changes no state: it returns its Routing, and the training step counts load and takes the
    auxiliary loss from that, once per micro-batch, in training only.
    """

    router: Router
    balancing: Balancing
    experts: Experts

    def __init__(
        self,
        *,
        router: Router,
        balancing: Balancing,
        dispatch: Dispatch,
        experts: Experts,
        shared_experts: nn.Module | None,
    ) -> None:
        super().__init__()
        self.router = router
        self.balancing = balancing
        self.dispatch = dispatch
        self.experts = experts
        self.shared_experts = shared_experts

    def forward(self, x_BTD: Tensor, tokens_BT: Tensor, replay_BTK: Tensor | None = None) -> tuple[Tensor, Routing]:
        """`replay_BTK`: experts to be used instead of the router's choice, where they are not -1."""
        x_ND = x_BTD.flatten(0, 1)
        routing = self.router(x_ND, self.balancing.bias, tokens_BT.flatten())
        if replay_BTK is not None:
            routing = replayed(self.router, routing, replay_BTK.flatten(0, 1))
        y_ND = self.dispatch(x_ND, routing, self.experts)
        if self.shared_experts is not None:
            y_ND = y_ND + self.shared_experts(x_ND)
        return y_ND.view_as(x_BTD), routing


def replayed(router: Router, routing: Routing, recorded_NK: Tensor) -> Routing:
    """The routing with the recorded experts where they are not -1, at gates from the affinities of now."""
    assert isinstance(router, ReplaysRouting), f"{type(router).__name__} cannot use recorded experts"
    experts_NK = torch.where(recorded_NK < 0, routing.experts_NK, recorded_NK)
    return routing._replace(experts_NK=experts_NK, gates_NK=router.gates(routing.affinities_NE, experts_NK))
