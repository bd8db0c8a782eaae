"""Quantisation-error metrics, collected during training: signal-to-noise ratio, underflow, saturation, amax."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dsv3.contracts import QuantisationLoss
from plugins.precision.quantiser import Groups, Quantiser

FIELDS = 6  # of one tensor's sums


@dataclass
class Measurement:
    """Sums over all tensors that are used in the same way by layers of the same role, while `active`."""

    active: bool = False
    sums: dict[tuple[str, str], Tensor] = field(default_factory=dict)

    def start(self) -> None:
        self.active, self.sums = True, {}

    def stop(self) -> dict[tuple[str, str], QuantisationLoss]:
        """What was measured since `start`, by role and factor."""
        self.active = False
        return {key: _loss(sums.tolist()) for key, sums in self.sums.items()}

    def add(
        self, role: str, factor: str, quantiser: Quantiser, x: Tensor, groups: Groups | None, scale: Tensor | None
    ) -> None:
        if not x.numel():
            return
        exact = x.double()
        values = quantiser.values(x, torch.float32, groups=groups, scale=scale).double()
        limit = math.inf if scale is None else quantiser.format.overflow * float(scale)
        new = torch.stack(
            [
                exact.square().sum(),
                (exact - values).square().sum(),
                (exact != 0).sum(),
                ((exact != 0) & (values == 0)).sum(),
                (exact.abs() >= limit).sum(),
                exact.abs().amax(),
            ]
        )
        old = self.sums.get((role, factor), torch.zeros_like(new))
        self.sums[role, factor] = torch.cat([old[:-1] + new[:-1], torch.maximum(old[-1:], new[-1:])])


def _loss(sums: list[float]) -> QuantisationLoss:
    signal, noise, numbers, underflown, saturated, amax = sums
    return QuantisationLoss(
        snr_db=10 * math.log10(signal / noise) if signal and noise else math.inf if signal else math.nan,
        underflow=underflown / numbers if numbers else 0.0,
        saturation=saturated / numbers if numbers else 0.0,
        amax=amax,
    )
