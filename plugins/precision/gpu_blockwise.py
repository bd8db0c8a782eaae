"""The recipe of `fp8_blockwise` in FP8 products of a GPU, by torch alone (`torch.nn.functional.scaled_mm`).

Codes and scales are those of the emulation, bit for bit. cuBLAS multiplies codes, and scales and adds the sums over 128
numbers in FP32 (Hopper GPUs, CUDA 12.9 or newer). It has no such product for groups of rows: experts compute in BF16.

Factors are a [M, K] and b [N, K], of which M, N and K are filled up with zeros to multiples of 128. cuBLAS reads scales
of 1 x 128 tiles as [M, K / 128] with neighbours in a column, those of 128 x 128 blocks as [K / 128, N / 128], likewise,
the columns filled up to multiples of four.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dsv3.bounds import NonNegativeFloat
from dsv3.contracts import Role
from plugins.precision.blockwise import FP8Blockwise
from plugins.precision.quantised_linear import QuantisedLinear
from plugins.precision.quantiser import Held, Quantiser, matrix_of

TILE = 128
NEEDS = "it needs a Hopper GPU (compute capability 9.0) and torch for CUDA 12.9 or newer"
INSTEAD = "use precision=fp8_blockwise, which emulates it on any device"


class Codes(NamedTuple):
    """A quantised matrix as cuBLAS reads it."""

    codes: Tensor  # float8_e4m3fn [M, K], multiples of 128
    scales: Tensor  # float32 [M, K / 128], or [M / 128, K / 128]

    @property
    def in_blocks(self) -> bool:
        return len(self.scales) < len(self.codes)

    @property
    def mT(self) -> "Codes":
        """Of the transposed matrix; blocks stay blocks."""
        return Codes(self.codes.mT.contiguous(), self.scales.mT.contiguous())


def encoded(x: Tensor, quantiser: Quantiser) -> Codes:
    """Codes and scales of a matrix in tiles of 1 x 128 or 128 x 128."""
    filled = F.pad(x, (0, -x.shape[1] % TILE, 0, -x.shape[0] % TILE))
    held = quantiser.held(filled)
    rows = len(filled) if quantiser.rows == 1 else len(filled) // TILE
    return Codes(matrix_of(held.codes, tuple(filled.shape)), held.scales.reshape(rows, -1))


def block_product(a: Codes, b: Codes, dtype: torch.dtype) -> Tensor:
    """a b^T in `dtype`; a in tiles, b in tiles or blocks."""
    recipe = F.ScalingType.BlockWise128x128 if b.in_blocks else F.ScalingType.BlockWise1x128
    b_scales = F.pad(b.scales, (0, -b.scales.shape[1] % 4)).mT if b.in_blocks else column_major(b.scales)
    return F.scaled_mm(
        a.codes, b.codes.mT,
        scale_a=column_major(a.scales), scale_recipe_a=F.ScalingType.BlockWise1x128,
        scale_b=b_scales, scale_recipe_b=recipe, output_dtype=dtype,
    )  # fmt: skip


def column_major(x: Tensor) -> Tensor:
    return x.mT.contiguous().mT


class _ScaledProducts(torch.autograd.Function):
    """The three products of a layer: those of `plugins.precision.quantised_linear`, with codes as factors."""

    @staticmethod
    def forward(ctx: Any, x_NK: Tensor, weight_OK: Tensor, layer: "ScaledLinear") -> Tensor:
        recipe, keeps_x = layer.recipe, ctx.needs_input_grad[1]
        same = recipe.x_fprop == recipe.x_held
        read, held = layer.read(x_NK, hold=True) if keeps_x or not same else (x_NK, None)
        ctx.save_for_backward(weight_OK, *(held if keeps_x and held is not None else ()))
        ctx.layer, ctx.shape = layer, tuple(x_NK.shape)
        x = encoded(x_NK if same else read, recipe.x_fprop)
        return block_product(x, layer.weight_codes(weight_OK), x_NK.dtype)[: len(x_NK), : len(weight_OK)]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weight_OK, *held = ctx.saved_tensors
        layer, (rows, width), dy_NO, dx_NK, dw_OK = ctx.layer, ctx.shape, grads[0], None, None
        recipe = layer.recipe
        if recipe.dy_held is not None:
            dy_NO = recipe.dy_held.values(dy_NO, torch.float32)
        if ctx.needs_input_grad[0]:
            dy = encoded(dy_NO, recipe.dy_dgrad)
            dx_NK = block_product(dy, layer.weight_codes(weight_OK).mT, grads[0].dtype)[:rows, :width]
        if ctx.needs_input_grad[1]:
            x_NK = recipe.x_held.decoded(Held(*held), ctx.shape, torch.float32)
            dy, x = (
                encoded(
                    factor.mT, replace(quantiser, rows=1, columns=TILE)
                )  # its columns are the transposed one's rows
                for factor, quantiser in ((dy_NO, recipe.dy_wgrad), (x_NK, recipe.x_wgrad))
            )
            dw_OK = block_product(dy, x, torch.float32)[: len(weight_OK), :width]
        return dx_NK, dw_OK, None


class ScaledLinear(QuantisedLinear):
    """y = x w^T by three products of FP8 codes; `weight` is FP32 [out, in]."""

    def hold_weights(self, hold: bool) -> bool:
        self.held_codes: Codes | None = None
        return super().hold_weights(hold)

    def weight_codes(self, weight_OK: Tensor) -> Codes:
        """While the weight is held, computed once."""
        if self.held is None:
            return encoded(weight_OK, self.recipe.w_fprop)
        if self.held_codes is None:
            self.held_codes = encoded(weight_OK, self.recipe.w_fprop)
        return self.held_codes

    def products(self, x: Tensor, counts_E: Tensor | None) -> Tensor:
        x_NK = x.to(self.activation_dtype).flatten(0, -2)
        if not x.numel():
            return x_NK.new_zeros(*x.shape[:-1], len(self.weight))
        y_NO: Tensor = _ScaledProducts.apply(x_NK, self.weight, self)
        return y_NO.reshape(*x.shape[:-1], -1)


class FP8GPU(FP8Blockwise):
    """The YAML file says what each setting does."""

    def __init__(
        self,
        *,
        roles: Sequence[Role],
        power_of_two_scales: bool,
        amax_floor: NonNegativeFloat,
        compile_quantiser: bool,
    ) -> None:
        if grouped := [role for role in roles if role.startswith("expert_")]:
            raise ValueError(
                f"precision.roles: must not include {grouped[0]}: torch has no grouped product with a scale for each "
                f"tile; precision=fp8_te has one"
            )
        super().__init__(
            roles=roles, tile=TILE, power_of_two_scales=power_of_two_scales, amax_floor=amax_floor,
            attention_out_format="E5M6", fp8_dispatch=False, save_swiglu_inputs=False, activation_grad_blocks=False,
            compile_quantiser=compile_quantiser,
        )  # fmt: skip

    def linear(self, in_features: int, out_features: int, *, role: Role) -> nn.Module:
        if role not in self.roles:
            return super().linear(in_features, out_features, role=role)
        return ScaledLinear(out_features, in_features, **self._settings(role))

    def check(self, device: torch.device) -> list[str]:
        if device.type != "cuda" or not torch.cuda.is_available():
            return [f"precision=fp8_gpu: {NEEDS}; {INSTEAD}"]
        version = tuple(int(number) for number in (torch.version.cuda or "0.0").split(".")[:2])
        if torch.cuda.get_device_capability(device) != (9, 0) or version < (12, 9):
            found = f"{torch.cuda.get_device_name(device)}, CUDA {torch.version.cuda}"
            return [f"precision=fp8_gpu: {NEEDS}, and this is {found}; {INSTEAD}"]
        return []
