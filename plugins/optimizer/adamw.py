"""AdamW (arXiv 1711.05101) as the report uses it: decay on matrices only, moments in FP32 or BF16.

    m = b1 m + (1 - b1) g          v = b2 v + (1 - b2) g^2
    p = p - lr * weight_decay * p - lr * (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)

Tables with sparse gradients are stepped by row-wise Adagrad (`rows`) instead.

Parameters, gradients and this arithmetic are FP32 in both; BF16 moments (report section 3.3.1) halve the state.
With b2 = 0.95, v moves by 5% of its distance from g^2 in a step, against BF16's spacing of 0.4 to 0.8%, so
rounding does not hold it up until it is that close.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dsv3.bounds import Fraction, NonNegativeFloat, PositiveFloat
from plugins.optimizer.rows import step_rows


def adamw(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    betas: tuple[Fraction, Fraction],
    eps: PositiveFloat,
    weight_decay: NonNegativeFloat,
    moments_dtype: Literal["float32", "bfloat16"],
    sparse_lr_scale: NonNegativeFloat,
) -> torch.optim.Optimizer:
    """An AdamW over two groups: matrices and stacks of them (ndim >= 2), decayed; the rest (norms), not decayed.

    sparse_lr_scale: the learning rate of tables with sparse gradients, as a multiple of the others'.

    The learning rate is 0 until the schedule sets it. Raises ValueError where `moments_dtype` is neither of the two.
    """
    beta1, beta2 = betas
    groups = decay_groups(named_parameters, weight_decay=weight_decay)
    for group in groups:
        group["sparse_lr_scale"] = sparse_lr_scale
    if moments_dtype == "float32":
        return FusedAdamW(groups, lr=0.0, betas=(beta1, beta2), eps=eps, fused=True)
    if moments_dtype == "bfloat16":
        return BF16MomentsAdamW(groups, betas=(beta1, beta2), eps=eps)
    raise ValueError(f"optimizer.moments_dtype={moments_dtype}: must be float32 or bfloat16")


def decay_groups(named_parameters: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters as a decayed group (ndim >= 2) and one that is not; a group without parameters is left out."""
    parameters = [parameter for _, parameter in named_parameters]
    matrices = [parameter for parameter in parameters if parameter.ndim >= 2]
    others = [parameter for parameter in parameters if parameter.ndim < 2]
    groups: list[dict[str, Any]] = [
        {"params": matrices, "weight_decay": weight_decay, "lr_scale": 1.0},
        {"params": others, "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    return [group for group in groups if group["params"]]


def loss_of(closure: Callable[[], Any] | None) -> Any:
    """What the closure that an optimiser's step was given returns; None without one."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def step_sparse(optimizer: torch.optim.Optimizer) -> None:
    """Step the tables with sparse gradients by row-wise Adagrad; those gradients are used up."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None and parameter.grad.is_sparse:
                rate = group["lr"] * group["sparse_lr_scale"]
                step_rows(parameter, parameter.grad, optimizer.state[parameter], lr=rate, eps=group["eps"])
                parameter.grad = None


class FusedAdamW(torch.optim.AdamW):
    """torch's AdamW, and sparse gradients."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = loss_of(closure)
        step_sparse(self)
        super().step()
        return loss


class PerParameter(torch.optim.Optimizer, ABC):
    """An optimiser that steps one parameter at a time; a subclass says how."""

    @abstractmethod
    def step_parameter(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        """Move `parameter` in place. `state` is its own, empty before the first step."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step every parameter that has a gradient; return what `closure`, which is called first, returns."""
        loss = loss_of(closure)
        step_sparse(self)
        for group in self.param_groups:
            self.step_group(group, [parameter for parameter in group["params"] if parameter.grad is not None])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore; numbers of steps that an older checkpoint holds as tensors become integers."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            if "exp_avg" in state:
                state["step"] = int(state["step"])

    def step_group(self, group: dict[str, Any], parameters: Sequence[nn.Parameter]) -> None:
        for parameter in parameters:
            assert parameter.grad is not None
            self.step_parameter(parameter, parameter.grad, self.state[parameter], group)


def adamw_step(
    parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any], *, moments_dtype: torch.dtype
) -> None:
    """One AdamW step of one parameter, in place; the moments are rounded to `moments_dtype` after their use."""
    if not state:
        state["step"] = 0
        state["exp_avg"] = torch.zeros_like(parameter, dtype=moments_dtype)
        state["exp_avg_sq"] = torch.zeros_like(parameter, dtype=moments_dtype)
    state["step"] += 1
    (beta1, beta2), step = group["betas"], state["step"]
    first = state["exp_avg"].float().lerp(gradient, 1 - beta1)
    second = (state["exp_avg_sq"].float() * beta2).addcmul_(gradient, gradient, value=1 - beta2)
    state["exp_avg"].copy_(first)
    state["exp_avg_sq"].copy_(second)
    scale = second.div_(1 - beta2**step).sqrt_().add_(group["eps"])
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.addcdiv_(first, scale, value=-group["lr"] / (1 - beta1**step))


class BF16MomentsAdamW(PerParameter):
    """AdamW that keeps both moments in BF16 between steps; each step computes with them in FP32, before rounding."""

    def __init__(self, groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups, {"lr": 0.0, "betas": betas, "eps": eps, "weight_decay": 0.0})

    def step_parameter(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        adamw_step(parameter, gradient, state, group, moments_dtype=torch.bfloat16)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore exactly: torch casts loaded state to its parameter's FP32, so the moments go back to BF16."""
        super().load_state_dict(state_dict)
        for state in self.state.values():
            for key in {"exp_avg", "exp_avg_sq"} & state.keys():
                state[key] = state[key].to(torch.bfloat16)
