"""FP8 with one scale per tensor: x, w and dy of a layer (all experts together)."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from dsv3.bounds import NonNegativeFloat, NonNegativeInt
from dsv3.contracts import Role
from plugins.precision.emulated import EmulatedFP8
from plugins.precision.formats import E4M3, FORMATS
from plugins.precision.quantised_linear import Recipe, row_and_column_recipe
from plugins.precision.quantiser import Quantiser
from plugins.precision.tensor_scales import TensorScales


class FP8Tensorwise(EmulatedFP8):
    """The YAML file says what each setting does."""

    def __init__(
        self,
        *,
        roles: Sequence[Role],
        amax_history: NonNegativeInt,
        power_of_two_scales: bool,
        amax_floor: NonNegativeFloat,
        gradient_format: Literal["E4M3", "E5M2"],
        compile_quantiser: bool,
    ) -> None:
        super().__init__(roles=roles, amax_floor=amax_floor)
        if amax_history < 0:
            raise ValueError(f"precision.amax_history={amax_history}: must be 0 or more")
        self.amax_history = amax_history
        self.whole = Quantiser(E4M3, None, None, power_of_two_scales, amax_floor, compile_quantiser)
        self.gradient_format = FORMATS[gradient_format]
        self.layers: list[TensorScales] = []

    def recipe(self, role: Role) -> Recipe:
        return row_and_column_recipe(self.whole, self.whole, self.gradient_format)

    def scales(self) -> TensorScales:
        self.layers.append(TensorScales(history=self.amax_history))
        return self.layers[-1]

    def maxima(self) -> list[Tensor]:
        """amax of the step, by layer; zeros where a layer is on another rank."""
        return [scales.precision_amax for scales in self.layers] if self.amax_history else []

    def end_step(self) -> None:
        """A step of training is done: its amax joins the history."""
        for scales in self.layers:
            scales.end_step()
