"""DeepSeek-V3's FP8 training (report section 3.3), emulated on any device.

Linear layers take E4M3 factors in all three products: activations and their gradients in tiles of 1 x 128 along the
axis that the product sums over, weights in blocks of 128 x 128, with scales from the tile's own amax. Embedding, head,
router, norms and attention compute as under `bf16`, and so do roles left out of `roles`; master weights, their
gradients and the optimiser keep their precision. What linear layers keep for the backward pass is FP8:

    x of a linear layer      E4M3, 1 x 128; turned into 128 x 1 tiles for Wgrad
    x of the output          E5M6, power-of-two scales; each product takes it as E4M3 from there
    projection of attention
    SwiGLU                   its inputs, E4M3; its output is computed again

Tokens travel to their experts in FP8 and the gradients of the experts' outputs too, with power-of-two scales: which
is how `expert_gate_up` reads x and `expert_down` reads dy. Dgrad multiplies what arrived, and the tiles of Wgrad have
power-of-two scales too, so that turning them rounds nothing again but what underflows.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from dsv3.bounds import NonNegativeFloat, PositiveInt
from dsv3.contracts import Role
from plugins.precision.emulated import EmulatedFP8
from plugins.precision.formats import E4M3, FORMATS
from plugins.precision.held_swiglu import held_swiglu
from plugins.precision.quantised_linear import Recipe
from plugins.precision.quantiser import Quantiser


class FP8Blockwise(EmulatedFP8):
    """E4M3 with a scale for each tile, computed from the tile."""

    def __init__(
        self,
        *,
        roles: Sequence[Role],
        tile: PositiveInt,
        power_of_two_scales: bool,
        amax_floor: NonNegativeFloat,
        attention_out_format: Literal["E5M6", "E4M3"],
        fp8_dispatch: bool,
        save_swiglu_inputs: bool,
        activation_grad_blocks: bool,
        compile_quantiser: bool,
    ) -> None:
        """The YAML file says what each does."""
        super().__init__(roles=roles, amax_floor=amax_floor)
        if tile < 1:
            raise ValueError(f"precision.tile={tile}: must be at least 1")
        self.tile = tile
        self.attention_out_format = FORMATS[attention_out_format]
        self.fp8_dispatch = fp8_dispatch
        self.save_swiglu_inputs = save_swiglu_inputs
        self.activation_grad_blocks = activation_grad_blocks
        self.row = Quantiser(E4M3, 1, tile, power_of_two_scales, amax_floor, compile_quantiser)

    def recipe(self, role: Role) -> Recipe:
        row = self.row
        column, block = replace(row, rows=self.tile, columns=1), replace(row, rows=self.tile)
        row_2, column_2 = replace(row, power_of_two=True), replace(column, power_of_two=True)
        dy_dgrad = block if self.activation_grad_blocks else row
        plain = Recipe(
            x_held=row, x_fprop=row, w_fprop=block,
            dy_held=None, dy_dgrad=dy_dgrad, w_dgrad=block,
            x_wgrad=column, dy_wgrad=column,
        )  # fmt: skip
        if role == "attention_out":
            held = replace(row_2, format=self.attention_out_format)
            return replace(plain, x_held=held, x_fprop=row_2, x_wgrad=column_2)
        if role == "expert_gate_up" and self.fp8_dispatch:
            return replace(plain, x_held=row_2, x_fprop=row_2, x_wgrad=column_2)
        if role == "expert_down" and self.fp8_dispatch:
            dgrad = dy_dgrad if self.activation_grad_blocks else row_2
            return replace(plain, dy_held=row_2, dy_dgrad=dgrad, dy_wgrad=column_2)
        return plain

    def swiglu(self, gate_up: Tensor, row_weights: Tensor | None = None) -> Tensor:
        reader: Role = "ffn_down" if row_weights is None else "expert_down"
        recorded = torch.is_grad_enabled() and gate_up.requires_grad
        if not (self.save_swiglu_inputs and recorded and reader in self.roles):
            return super().swiglu(gate_up, row_weights)
        return held_swiglu(gate_up, row_weights, self.row)
