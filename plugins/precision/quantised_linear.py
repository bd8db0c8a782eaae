"""Linear layers, dense and grouped, whose three GEMMs take quantised operands.

    Fprop  y  = Q(x) Q(w)^T        Dgrad  dx = Q(dy) Q(w)        Wgrad  dw = Q(dy)^T Q(x)

with x [N, in], w [out, in], dy [N, out]. Each factor of each product has a quantiser of its own, because tiles along
the axis that a product sums over are rows for one and columns for another. What a product multiplies are the quantised
values, in a dtype that holds them: BF16 where all scales are powers of two (a few bits of mantissa: exact), otherwise
FP32 (code * scale, rounded once). Sums are FP32. y and dx leave in the activations' dtype; dw is computed in FP32.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dsv3.contracts import GroupedMM, Role
from dsv3.model.layers import local, on_host
from plugins.precision.formats import Format
from plugins.precision.held_swiglu import Origin, origin_of
from plugins.precision.measurement import Measurement
from plugins.precision.quantiser import Groups, Held, Quantiser
from plugins.precision.tensor_scales import TensorScales

Factor = Literal["x_held", "x_fprop", "w_fprop", "dy_held", "dy_dgrad", "w_dgrad", "x_wgrad", "dy_wgrad"]
GROUPED_MM_ALIGNMENT = 16  # bytes; of every row that torch's grouped product reads


@dataclass(frozen=True)
class Recipe:
    """A quantiser for every factor; equal ones share their work."""

    x_held: Quantiser  # x as it is kept for the backward pass; all products read it through this
    x_fprop: Quantiser
    w_fprop: Quantiser
    dy_held: Quantiser | None  # dy as it arrives, where it travels quantised
    dy_dgrad: Quantiser
    w_dgrad: Quantiser
    x_wgrad: Quantiser
    dy_wgrad: Quantiser


def row_and_column_recipe(row: Quantiser, column: Quantiser, gradient_format: Format) -> Recipe:
    """`row` for the factors of which a product sums along the rows (x and w of Fprop, dy of Dgrad), `column` for those
    of which it sums along the columns (w of Dgrad, x and dy of Wgrad); dy in `gradient_format`."""
    return Recipe(
        x_held=row,
        x_fprop=row,
        w_fprop=row,
        dy_held=None,
        dy_dgrad=replace(row, format=gradient_format),
        w_dgrad=column,
        x_wgrad=column,
        dy_wgrad=replace(column, format=gradient_format),
    )


class _Products(torch.autograd.Function):
    """The three products of a layer."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NK: Tensor,
        weight: Tensor,
        layer: "QuantisedLinear",
        counts_E: Tensor | None,
        origin: Origin | None,
        recorded: bool,
    ) -> Tensor:
        """`recorded`: whether there may be a backward pass (`needs_input_grad` does not know of `no_grad`)."""
        keeps_x = recorded and ctx.needs_input_grad[1]
        x, held = layer.read(x_NK, hold=keeps_x and origin is None)
        if held is not None:
            origin = Origin(held, layer.restored(tuple(x_NK.shape)))
        kept = origin.tensors if keeps_x and origin is not None else ()
        ctx.save_for_backward(weight, counts_E, *kept)
        ctx.layer, ctx.restore, ctx.was_held = layer, None if origin is None else origin.restore, held is not None
        return layer.product(x, layer.weight_factor("w_fprop", weight, x.dtype), counts_E).to(x_NK.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, counts_E, *kept = ctx.saved_tensors
        layer: QuantisedLinear = ctx.layer
        groups = None if counts_E is None else Groups(counts_E, len(grads[0]))
        recipe, dy_NO, dx_NK, dy, dw = layer.recipe, grads[0], None, None, None
        if recipe.dy_held is not None:
            dy_NO = layer.factor("dy_held", dy_NO, torch.float32, groups)
        if ctx.needs_input_grad[0]:
            dtype = layer.dtype_of("dy_dgrad", "w_dgrad")
            as_held = recipe.dy_dgrad == recipe.dy_held
            dy = dy_NO.to(dtype) if as_held else layer.factor("dy_dgrad", dy_NO, dtype, groups)
            dx_NK = layer.product(dy, layer.weight_factor("w_dgrad", weight, dtype).mT, counts_E).to(grads[0].dtype)
        if ctx.needs_input_grad[1]:
            if dy is None or recipe.dy_wgrad != recipe.dy_dgrad:
                dy = layer.factor("dy_wgrad", dy_NO, torch.float32, groups)
            x = ctx.restore(*kept)
            if not ctx.was_held or recipe.x_wgrad != recipe.x_held:
                x = layer.factor("x_wgrad", x, torch.float32, groups)
            dw = layer.weight_gradient(dy.float(), x, counts_E)
        return dx_NK, dw, None, None, None, None


class QuantisedLinear(nn.Module):
    """y = x w^T by `recipe`; `weight` is the FP32 master weight [out, in]."""

    compilable = False  # dynamo cannot trace weights cached between micro-batches, nor the origin of a saved input

    def __init__(
        self,
        *shape: int,
        role: Role,
        recipe: Recipe,
        activation_dtype: torch.dtype,
        measurement: Measurement,
        scales: TensorScales | None,
    ) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.role: Role = role
        self.recipe = recipe
        self.activation_dtype = activation_dtype
        self.measurement = measurement
        self.scales = scales
        self.held: dict[tuple[Quantiser, torch.dtype], Tensor] | None = None  # values of the weight, while it is held

    def hold_weights(self, hold: bool) -> bool:
        """Whether that changed anything. Values are kept as they are first needed."""
        if hold == (self.held is not None):
            return False
        self.held = {} if hold else None
        return True

    def forward(self, x: Tensor) -> Tensor:
        return self.products(x, None)

    def products(self, x: Tensor, counts_E: Tensor | None) -> Tensor:
        """y of x [..., in]; for grouped layers x is [M, in], and `counts_E` the rows of each group."""
        x_NK, weight = x.to(self.activation_dtype).flatten(0, -2), local(self.weight)
        if not x.numel():
            return self.product(x_NK, weight.to(x_NK.dtype), counts_E)
        recorded = torch.is_grad_enabled()
        y_NO = _Products.apply(x_NK, weight, self, counts_E, origin_of(x) if recorded else None, recorded)
        return y_NO.view(*x.shape[:-1], -1)

    def factor(self, name: Factor, x: Tensor, dtype: torch.dtype, groups: Groups | None = None) -> Tensor:
        """A factor's values, as its quantiser makes them."""
        quantiser: Quantiser = getattr(self.recipe, name)
        scale = self.scales(name, quantiser, x) if self.scales else None
        if self.measurement.active:
            self.measurement.add(self.role, name, quantiser, x, groups, scale)
        return quantiser.values(x, dtype, groups=groups, scale=scale)

    def weight_factor(self, name: Factor, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """The same of the weight: while it is held, each way of quantising it is computed once."""
        if self.held is None or self.scales or self.measurement.active:
            return self.factor(name, weight, dtype)
        key = getattr(self.recipe, name), dtype
        if key not in self.held:
            self.held[key] = self.factor(name, weight, dtype)
        return self.held[key]

    def read(self, x_NK: Tensor, *, hold: bool) -> tuple[Tensor, Held | None]:
        """x as Fprop multiplies it, and as it is kept where it is to be."""
        recipe, dtype = self.recipe, self.dtype_of("x_fprop", "w_fprop")
        scale = self.scales("x_held", recipe.x_held, x_NK) if self.scales else None
        if self.measurement.active:
            self.measurement.add(self.role, "x_held", recipe.x_held, x_NK, None, scale)
        if hold:
            x, held = recipe.x_held.values_and_held(x_NK, dtype, scale=scale)
        else:
            x, held = recipe.x_held.values(x_NK, dtype, scale=scale), None
        return (x if recipe.x_fprop == recipe.x_held else self.factor("x_fprop", x, dtype)), held

    def restored(self, shape: tuple[int, ...]) -> Callable[..., Tensor]:
        """What makes of codes and scales the x that was held."""
        quantiser = self.recipe.x_held
        return lambda codes, scales: quantiser.decoded(Held(codes, scales), shape, torch.float32)

    def dtype_of(self, *factors: Factor) -> torch.dtype:
        """The dtype that a product's factors are multiplied in: the activations' where it holds their values."""
        exact = all(getattr(self.recipe, factor).power_of_two for factor in factors)
        return self.activation_dtype if exact else torch.float32

    def product(self, x_NK: Tensor, w_OK: Tensor, counts_E: Tensor | None) -> Tensor:
        return F.linear(x_NK, w_OK)

    def weight_gradient(self, dy_NO: Tensor, x_NK: Tensor, counts_E: Tensor | None) -> Tensor:
        return dy_NO.T @ x_NK


class QuantisedGroupedLinear(QuantisedLinear):
    """The same for each of E groups of rows; `weight` is [E, out, in]."""

    def __init__(self, *shape: int, grouped_mm: GroupedMM, **settings: Any) -> None:
        super().__init__(*shape, **settings)
        self.grouped_mm = grouped_mm

    def forward(self, x_MK: Tensor, counts_E: Tensor) -> Tensor:  # type: ignore[override]
        return self.products(x_MK, counts_E)

    def product(self, x_NK: Tensor, w_OK: Tensor, counts_E: Tensor | None) -> Tensor:
        assert counts_E is not None
        return self.grouped_mm(x_NK, w_OK, counts_E)

    def weight_gradient(self, dy_NO: Tensor, x_NK: Tensor, counts_E: Tensor | None) -> Tensor:
        """One product an expert; an expert without rows gets zeros."""
        assert counts_E is not None
        numbers = GROUPED_MM_ALIGNMENT // dy_NO.element_size()
        if dy_NO.stride(0) % numbers or x_NK.stride(0) % numbers or not len(x_NK):
            rows = on_host(counts_E)
            parts = zip(dy_NO.split(rows), x_NK.split(rows), strict=True)
            return torch.stack([dy.T @ x for dy, x in parts])
        return F.grouped_mm(dy_NO.T, x_NK, offs=counts_E.cumsum(0).to(torch.int32))
