"""Base of the emulated FP8 precisions: roles in FP8 by a recipe, all others in BF16, and measurement."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import nn

from dsv3.bounds import NonNegativeFloat
from dsv3.contracts import GroupedMM, QuantisationLoss, Role
from plugins.precision.measurement import Measurement
from plugins.precision.plain import BF16
from plugins.precision.quantised_linear import QuantisedGroupedLinear, QuantisedLinear, Recipe, TensorScales


def without_head(roles: Sequence[Role]) -> tuple[Role, ...]:
    """The roles, which do not name the head.

    Raises:
        ValueError: they do.
    """
    if "head" in roles:
        raise ValueError("precision.roles: must not include head: the loss multiplies by its weight in BF16")
    return tuple(roles)


class EmulatedFP8(BF16, ABC):
    """A precision whose layers of `roles` are quantised; a subclass says how in `recipe`."""

    def __init__(self, *, roles: Sequence[Role], amax_floor: NonNegativeFloat) -> None:
        if not amax_floor > 0:
            raise ValueError(f"precision.amax_floor={amax_floor}: must be above 0, or a tile of zeros has no scale")
        self.roles = without_head(roles)
        self.measurement = Measurement()

    @abstractmethod
    def recipe(self, role: Role) -> Recipe:
        """What each product of a layer takes its factors as."""

    def scales(self) -> TensorScales | None:
        """What gives a new layer's factors their scales, where these do not follow from tiles."""
        return None

    def linear(self, in_features: int, out_features: int, *, role: Role) -> nn.Module:
        if role not in self.roles:
            return super().linear(in_features, out_features, role=role)
        return QuantisedLinear(out_features, in_features, **self._settings(role))

    def grouped_linear(
        self, n_groups: int, in_features: int, out_features: int, *, role: Role, grouped_mm: GroupedMM
    ) -> nn.Module:
        if role not in self.roles:
            return super().grouped_linear(n_groups, in_features, out_features, role=role, grouped_mm=grouped_mm)
        shape = (n_groups, out_features, in_features)
        return QuantisedGroupedLinear(*shape, grouped_mm=grouped_mm, **self._settings(role))

    def _settings(self, role: Role) -> dict[str, Any]:
        return {
            "role": role,
            "recipe": self.recipe(role),
            "activation_dtype": self.activation_dtype,
            "measurement": self.measurement,
            "scales": self.scales(),
        }

    def start_measuring(self) -> None:
        self.measurement.start()

    def stop_measuring(self) -> dict[tuple[str, str], QuantisationLoss]:
        return self.measurement.stop()
