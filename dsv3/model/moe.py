"""DeepSeekMoE (report eq. 12): shared experts for every token, K of E routed experts for each."""

from torch import Tensor, nn

from dsv3.contracts import Balancing, Dispatch, Experts, Router, Routing


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

    def forward(self, x_BTD: Tensor, tokens_BT: Tensor) -> tuple[Tensor, Routing]:
        x_ND = x_BTD.flatten(0, 1)
        routing = self.router(x_ND, self.balancing.bias, tokens_BT.flatten())
        y_ND = self.dispatch(x_ND, routing, self.experts)
        if self.shared_experts is not None:
            y_ND = y_ND + self.shared_experts(x_ND)
        return y_ND.view_as(x_BTD), routing
