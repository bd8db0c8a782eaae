"""FP8 with one scale per row or column along a GEMM's summed axis.

That is x and dy by token, w by output (Fprop) or by input (Dgrad). For Wgrad, which sums over tokens, x and dy have a
scale for each channel, and the experts' tokens are apart. An outlier reaches further than under `fp8_blockwise` and
less far than under `fp8_tensorwise`.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from dsv3.bounds import NonNegativeFloat
from dsv3.contracts import Role
from plugins.precision.emulated import EmulatedFP8
from plugins.precision.formats import E4M3, FORMATS
from plugins.precision.quantised_linear import Recipe, row_and_column_recipe
from plugins.precision.quantiser import Quantiser


class FP8Rowwise(EmulatedFP8):
    """The YAML file says what each setting does."""

    def __init__(
        self,
        *,
        roles: Sequence[Role],
        power_of_two_scales: bool,
        amax_floor: NonNegativeFloat,
        gradient_format: Literal["E4M3", "E5M2"],
        compile_quantiser: bool,
    ) -> None:
        super().__init__(roles=roles, amax_floor=amax_floor)
        self.row = Quantiser(E4M3, 1, None, power_of_two_scales, amax_floor, compile_quantiser)
        self.gradient_format = FORMATS[gradient_format]

    def recipe(self, role: Role) -> Recipe:
        return row_and_column_recipe(self.row, replace(self.row, rows=None, columns=1), self.gradient_format)
