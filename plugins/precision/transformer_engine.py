"""FP8 on a GPU by Transformer Engine (TE): te.Linear and te.GroupedLinear for some roles, BF16 for all others.

TE's Float8BlockScaling is the report's recipe: E4M3, activations in 1 x 128 tiles, weights in 128 x 128 blocks, scales
from the tile's own amax. Unlike `fp8_blockwise` it quantises x for Wgrad from BF16 rather than from its FP8 form, and
has neither E5M6 nor FP8 inputs of SwiGLU.

A layer owns its FP32 master weight under the same name and shape as in every other precision, and lends it to a TE
module without weights of its own for each call. So checkpoints pass between precisions, embedding and head stay shared,
nothing else of the model is touched, and gradients arrive in FP32 (from TE's BF16).

TE is imported with the first layer: it cannot be imported without a GPU.
"""

import importlib.util
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from dsv3.bounds import NonNegativeFloat
from dsv3.contracts import GroupedMM, Role
from dsv3.model.layers import local
from plugins.precision.emulated import without_head
from plugins.precision.plain import BF16

INSTALL = "pip install 'transformer-engine[pytorch]==2.20.2'"
INSTEAD = "use precision=fp8_blockwise, which emulates its recipe on any device"
RecipeName = Literal[
    "Float8BlockScaling", "Float8CurrentScaling", "DelayedScaling", "MXFP8BlockScaling", "NVFP4BlockScaling"
]


def multiple(recipe: RecipeName) -> int:
    """Of every size of a product under the recipe."""
    return 32 if recipe == "MXFP8BlockScaling" else 16


def library() -> Any:
    """transformer_engine.pytorch."""
    import transformer_engine.pytorch

    return transformer_engine.pytorch


def te_recipe(name: RecipeName, *, power_of_two_scales: bool, amax_floor: float) -> Any:
    """TE's recipe of that name. Those that compute scales from the tensor itself take the settings; all use E4M3."""
    from transformer_engine.common import recipe as recipes

    if name in ("Float8BlockScaling", "Float8CurrentScaling"):
        recipe = getattr(recipes, name)(fp8_format=recipes.Format.E4M3)
        quantisation = recipes.QParams(power_2_scale=power_of_two_scales, amax_epsilon=amax_floor)
        for tensor in ("fwd_inp", "fwd_weight", "bwd_grad"):  # no fields: the constructor ignores them
            setattr(recipe, f"fp8_quant_{tensor}", quantisation)
        return recipe
    if name == "DelayedScaling":
        return recipes.DelayedScaling(fp8_format=recipes.Format.E4M3)
    return getattr(recipes, name)()


class TELinear(nn.Module):
    """y = x w^T by `module`, a te.Linear; `weight` is FP32 [out, in]."""

    def __init__(self, *shape: int, te: Any, recipe: Any, multiple: int, module: nn.Module) -> None:
        """`multiple`: of rows, to which they are filled up."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(shape))
        self.te = te
        self.recipe = recipe
        self.multiple = multiple
        self.lent = (module,)  # in a tuple, or its parameters would be this module's

    def forward(self, x: Tensor) -> Tensor:
        x_NK = x.flatten(0, -2)
        filled = F.pad(x_NK, (0, 0, 0, -len(x_NK) % self.multiple))
        return self.computed({"weight": self.weight}, filled)[: len(x_NK)].unflatten(0, x.shape[:-1])

    def computed(self, weights: dict[str, Tensor], *arguments: Any) -> Tensor:
        """The module's result with these weights, under TE's recipe; TE casts FP32 weights under torch's autocast."""
        device = self.weight.device.type
        with torch.autocast(device, torch.bfloat16), self.te.autocast(enabled=True, recipe=self.recipe):
            return functional_call(self.lent[0], weights, arguments)


class TEGroupedLinear(TELinear):
    """The same by a te.GroupedLinear for each of E groups of rows; `weight` is [E, out, in]."""

    def forward(self, x_MK: Tensor, counts_E: Tensor) -> Tensor:  # type: ignore[override]
        n_groups, counts = len(counts_E), counts_E.tolist()
        with self.te.autocast(enabled=True, recipe=self.recipe):
            filled, filled_counts = self.te.Fp8Padding(n_groups)(x_MK, counts)
        weights = {f"weight{i}": weight for i, weight in enumerate(local(self.weight).unbind(0))}
        y = self.computed(weights, filled, filled_counts)
        return self.te.Fp8Unpadding(n_groups)(y, counts)


class FP8TransformerEngine(BF16):
    """The YAML file says what each setting does."""

    def __init__(
        self, *, roles: Sequence[Role], recipe: RecipeName, power_of_two_scales: bool, amax_floor: NonNegativeFloat
    ) -> None:
        self.roles = without_head(roles)
        self.recipe = recipe
        self.settings: dict[str, Any] = {"power_of_two_scales": power_of_two_scales, "amax_floor": amax_floor}

    def linear(self, in_features: int, out_features: int, *, role: Role) -> nn.Module:
        if role not in self.roles:
            return super().linear(in_features, out_features, role=role)
        te = self._library(role, in_features, out_features)
        module = te.Linear(in_features, out_features, bias=False, params_dtype=torch.float32, device="meta")
        return TELinear(out_features, in_features, te=te, module=module, **self._settings())

    def grouped_linear(
        self, n_groups: int, in_features: int, out_features: int, *, role: Role, grouped_mm: GroupedMM
    ) -> nn.Module:
        if role not in self.roles:
            return super().grouped_linear(n_groups, in_features, out_features, role=role, grouped_mm=grouped_mm)
        te = self._library(role, in_features, out_features)
        module = te.GroupedLinear(
            n_groups, in_features, out_features, bias=False, params_dtype=torch.float32, device="meta"
        )
        return TEGroupedLinear(n_groups, out_features, in_features, te=te, module=module, **self._settings())

    def _settings(self) -> dict[str, Any]:
        return {"recipe": te_recipe(self.recipe, **self.settings), "multiple": multiple(self.recipe)}

    def check(self, device: torch.device) -> list[str]:
        if importlib.util.find_spec("transformer_engine") is None:
            return [f"precision=fp8_te: Transformer Engine is not installed: {INSTALL}; or {INSTEAD}"]
        if device.type != "cuda" or not torch.cuda.is_available():
            there = "one is there: trainer.accelerator=cuda" if torch.cuda.is_available() else "there is none"
            return [f"precision=fp8_te: it needs a CUDA GPU, and {there}; or {INSTEAD}"]
        try:
            te = library()
        except (ImportError, OSError, RuntimeError) as error:
            return [f"precision=fp8_te: Transformer Engine cannot be imported ({error}): {INSTALL}; or {INSTEAD}"]
        supported = {
            "Float8BlockScaling": te.is_fp8_block_scaling_available,
            "MXFP8BlockScaling": te.is_mxfp8_available,
            "NVFP4BlockScaling": te.is_nvfp4_available,
        }.get(self.recipe, te.is_fp8_available)
        available, reason = supported(return_reason=True)
        return [] if available else [f"precision.recipe={self.recipe}: {reason}; or {INSTEAD}"]

    def _library(self, role: Role, *sizes: int) -> Any:
        """TE, for a layer of these sizes.

        Raises:
            ValueError: it cannot be imported, or has no products of such sizes.
        """
        for size in sizes:
            if size % multiple(self.recipe):
                raise ValueError(
                    f"precision=fp8_te: {role} has size {size}, not a multiple of {multiple(self.recipe)}: change "
                    f"the model, or remove the role from precision.roles"
                )
        try:
            return library()
        except (ImportError, OSError, RuntimeError) as error:
            raise ValueError(
                f"precision=fp8_te: Transformer Engine cannot be imported ({error}); it needs a GPU and {INSTALL}"
            ) from None
