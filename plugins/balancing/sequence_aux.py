"""The sequence-wise balance loss (report eq. 17-20): alpha * sum_i f_i P_i, averaged over sequences.

    f_i = E / (K T) * sum_t 1[s_i,t among the top K of the RAW affinities of token t]
    P_i = (1 / T) * sum_t s_i,t / sum_j s_j,t
A row of the micro-batch is one sequence, packed or not; T is the number of its real tokens. The loss equals
alpha where every expert is loaded alike. The bias of another part does not enter: f uses the raw affinities.
"""

from torch import Tensor

from dsv3.bounds import NonNegativeFloat, PositiveInt
from dsv3.contracts import Routing
from plugins.balancing.base import Unbalanced, load_product, normalised


class SequenceAux(Unbalanced):
    """Balances the experts within each sequence by a loss.

    n_experts, top_k: E and K.
    alpha: weight of the loss; 1e-4 beside loss-free balancing, 0.001 to 0.003 alone (V2).
    """

    def __init__(self, *, n_experts: PositiveInt, top_k: PositiveInt, alpha: NonNegativeFloat) -> None:
        super().__init__(n_experts=n_experts)
        self.top_k = top_k
        self.alpha = alpha

    def loss(self, routing: Routing, batch_shape: tuple[int, int], mask_BT: Tensor, tokens_seen: int) -> Tensor:
        affinities_BTE = routing.affinities_NE.unflatten(0, batch_shape)
        chosen_BTK = affinities_BTE.detach().topk(self.top_k, dim=-1).indices
        product_B = load_product(chosen_BTK, normalised(affinities_BTE), mask_BT)
        return self.alpha * product_B.sum() / mask_BT.any(1).sum().clamp(min=1)
