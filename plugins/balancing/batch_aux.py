"""Balance losses over a whole micro-batch: batch-wise (report section 4.5.3) and Switch Transformer's.

    loss = alpha * sum_i f_i P_i        P_i = mean over the micro-batch's real tokens of s_i / sum_j s_j
    batch-wise:  f_i = E / (K N) * how many tokens have expert i among the top K of their RAW affinities
    Switch (arXiv 2101.03961, eq. 4-6):  f_i = E / (K N) * how many tokens were SENT to expert i
They differ only where a selection bias or groups move the choice. Both equal alpha where every expert is loaded
alike. The batch is the micro-batch on this device: with several of them in a step, none sees the others' load.
"""

from torch import Tensor

from dsv3.bounds import NonNegativeFloat, PositiveInt
from dsv3.contracts import Routing
from plugins.balancing.base import Unbalanced, load_product, normalised


class BatchAux(Unbalanced):
    """Balances the experts over a micro-batch, leaving each sequence free.

    n_experts, top_k: E and K. alpha: weight of the loss.
    """

    def __init__(self, *, n_experts: PositiveInt, top_k: PositiveInt, alpha: NonNegativeFloat) -> None:
        super().__init__(n_experts=n_experts)
        self.top_k = top_k
        self.alpha = alpha

    def loss(self, routing: Routing, batch_shape: tuple[int, int], mask_BT: Tensor, tokens_seen: int) -> Tensor:
        chosen_NK = routing.affinities_NE.detach().topk(self.top_k, dim=-1).indices
        return self.alpha * _product(chosen_NK, routing.affinities_NE, mask_BT)


class SwitchAux(Unbalanced):
    """Balances the experts that tokens were sent to, over a micro-batch.

    n_experts: E. alpha: weight of the loss.
    """

    def __init__(self, *, n_experts: PositiveInt, alpha: NonNegativeFloat) -> None:
        super().__init__(n_experts=n_experts)
        self.alpha = alpha

    def loss(self, routing: Routing, batch_shape: tuple[int, int], mask_BT: Tensor, tokens_seen: int) -> Tensor:
        return self.alpha * _product(routing.experts_NK, routing.affinities_NE, mask_BT)


def _product(chosen_NK: Tensor, affinities_NE: Tensor, mask_BT: Tensor) -> Tensor:
    """sum_i f_i P_i with the micro-batch taken as one long row."""
    return load_product(chosen_NK[None], normalised(affinities_NE)[None], mask_BT.reshape(1, -1)).squeeze(0)
