"""Auxiliary-loss-free balancing (arXiv 2408.15664; report section 2.1.2, after eq. 16).

After each optimiser step, with load_i the number of times expert i was chosen in the whole global batch:
    sign:           b_i += gamma * sign(mean load - load_i)
    proportional:   b_i += gamma * (mean load - load_i) / mean load
The sign is decided on integers, so it is exact at any load. A step in which nothing was observed changes nothing.
"""

from typing import Literal

import torch
from torch import Tensor

from dsv3.bounds import PositiveInt
from dsv3.contracts import Schedule
from plugins.balancing.base import Unbalanced


class LossFree(Unbalanced):
    """Moves a selection bias against the load; no gradient, no loss.

    n_experts: E.
    gamma: speed of the bias, a function of tokens.
    rule: `sign` or `proportional`.
    centred: subtract the bias's mean after each update. Selection within a layer does not depend on it.

    State: `bias` float32 [E], `counts` int64 [E] of what was observed since the last update.
    """

    counts: Tensor

    def __init__(
        self, *, n_experts: PositiveInt, gamma: Schedule, rule: Literal["sign", "proportional"], centred: bool
    ) -> None:
        super().__init__(n_experts=n_experts)
        if rule not in ("sign", "proportional"):
            raise ValueError(f"balancing rule={rule}: must be sign or proportional")
        self.register_buffer("bias", torch.zeros(n_experts))
        self.register_buffer("counts", torch.zeros(n_experts, dtype=torch.int64))
        self.gamma = gamma
        self.rule = rule
        self.centred = centred

    @torch.no_grad()
    def observe(self, counts_E: Tensor) -> None:
        if counts_E.is_floating_point():
            raise ValueError(f"counts are integers, not {counts_E.dtype}: floats lose large counts")
        self.counts += counts_E

    @torch.no_grad()
    def update(self, tokens_seen: int) -> None:
        total = self.counts.sum()
        lack_E = total - self.counts.numel() * self.counts  # E * (mean load - load_i)
        violation_E = lack_E.sign().float() if self.rule == "sign" else lack_E / total.clamp(min=1)
        moved_E = self.bias + self.gamma(tokens_seen) * violation_E
        if self.centred:
            moved_E -= moved_E.mean()
        self.bias.copy_(torch.where(total > 0, moved_E, self.bias))
        self.counts.zero_()
