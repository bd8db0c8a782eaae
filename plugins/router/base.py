"""Base of routers: fixed-FP32 projection, and top-K with a defined rule for ties."""

import torch
from torch import Tensor, nn

from dsv3.bounds import PositiveInt
from dsv3.model.layers import FixedDtype
from dsv3.model.recompute import recomputed


class FP32Projection(FixedDtype):
    """u . e_i for every expert i, in FP32 whatever the input's dtype, autocast or a cast of the whole model.

    `weight` is [E, D], a row e_i per expert.
    """

    def __init__(self, *, dim: PositiveInt, n_experts: PositiveInt, top_k: PositiveInt) -> None:
        super().__init__()
        if not 1 <= top_k <= n_experts:
            raise ValueError(f"top_k={top_k}: must be between 1 and n_experts={n_experts}")
        self.top_k = top_k
        self.weight = nn.Parameter(torch.empty(n_experts, dim).normal_(std=dim**-0.5))

    def logits(self, x_ND: Tensor) -> Tensor:
        with torch.autocast(x_ND.device.type, enabled=False):
            return nn.functional.linear(recomputed("norm", Tensor.float, x_ND), self.weight)


FEW = 64  # rows, of which a whole sort takes less time than preparing for a selection


def top(scores_NE: Tensor, k: int) -> Tensor:
    """Indices [N, k] of each row's k highest scores, highest first; of equal scores the lower index comes first.

    `topk` has no rule for equal scores, and a stable sort of 256 takes ten times as long. So no two are equal: the bits
    of each FP32 score, as a whole number in the same order, stand above its index counted from the end.
    """
    scores_NE = scores_NE.detach()
    if len(scores_NE) <= FEW or scores_NE.dtype != torch.float32:
        return scores_NE.sort(dim=-1, descending=True, stable=True).indices[:, :k]
    bits_NE = (scores_NE + 0.0).view(torch.int32)  # -0 becomes 0
    ordered_NE = torch.where(bits_NE < 0, bits_NE ^ 0x7FFFFFFF, bits_NE)
    from_the_end_E = torch.arange(scores_NE.shape[1] - 1, -1, -1, device=scores_NE.device)
    return (ordered_NE.long() << 32 | from_the_end_E).topk(k, dim=-1).indices


def check_groups(*, n_experts: int, top_k: int, n_groups: int, topk_groups: int) -> None:
    """Raise ValueError unless the experts fall into equal groups and those kept hold at least top_k experts."""
    if n_groups < 1 or n_experts % n_groups:
        raise ValueError(f"n_groups={n_groups}: must divide n_experts={n_experts}")
    if not 1 <= topk_groups <= n_groups:
        raise ValueError(f"topk_groups={topk_groups}: must be between 1 and n_groups={n_groups}")
    kept = topk_groups * (n_experts // n_groups)
    if top_k > kept:
        raise ValueError(
            f"top_k={top_k}: the topk_groups={topk_groups} groups of {n_experts // n_groups} experts "
            f"that a token may use hold only {kept}"
        )


def keep_groups(choice_NE: Tensor, group_scores_NG: Tensor, topk_groups: int) -> Tensor:
    """`choice_NE` with -inf for every expert outside the row's `topk_groups` best groups.

    Never 0: a biased affinity may be negative, and a masked expert would then be chosen before an allowed one.
    """
    n_groups = group_scores_NG.shape[1]
    dropped_NG = torch.ones_like(group_scores_NG, dtype=torch.bool)
    dropped_NG.scatter_(1, top(group_scores_NG, topk_groups), False)
    return choice_NE.unflatten(1, (n_groups, -1)).masked_fill(dropped_NG.unsqueeze(2), float("-inf")).flatten(1)
