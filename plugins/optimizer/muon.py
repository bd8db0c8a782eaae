"""Muon (Jordan et al. 2024; scaled as in Moonlight, arXiv 2502.16982) for matrices, AdamW for the rest.

Tables with sparse gradients are stepped by row-wise Adagrad (`rows`) instead.

For a hidden matrix W [out, in] with gradient G, momentum mu, and O(X) the orthogonal factor of X:
    M = mu M + G          U = G + mu M  (Nesterov)
    W = W - lr * weight_decay * W - lr * 0.2 * sqrt(max(out, in)) * O(U)
The entries of O(U) have root mean square 1 / sqrt(max(out, in)) at full rank, so the factor gives every
matrix updates of about 0.2, which is what AdamW's are: both can share one learning rate and decay.
The factor is on the update only, never on the decay, which is why it is not a group's `lr_scale`.

O(X) is approximated by Newton-Schulz steps on X / |X|_F:
    A = X X^T          X = a X + (b A + c A A) X          (a, b, c) = (3.4445, -4.7750, 2.0315)
which bring singular values to between about 0.7 and 1.2. The experts' stack [E, out, in] is a batch of matrices, and
where a part joins several matrices in one weight (gate and up projections), each is a W of its own.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dsv3.bounds import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt
from dsv3.distributed.whole_matrices import apply_to_whole
from dsv3.model.layers import local, matrices
from plugins.optimizer.adamw import PerParameter, adamw_step, decay_groups

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def muon(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    *,
    momentum: Fraction,
    newton_schulz_steps: PositiveInt,
    newton_schulz_dtype: Literal["bfloat16", "float32"],
    adamw_params: Sequence[str],
    lr_scale: NonNegativeFloat,
    adamw_lr_scale: NonNegativeFloat,
    betas: tuple[Fraction, Fraction],
    eps: PositiveFloat,
    weight_decay: NonNegativeFloat,
    sparse_lr_scale: NonNegativeFloat,
) -> torch.optim.Optimizer:
    """One optimiser: Muon for parameters with ndim >= 2 whose name fits none of `adamw_params`, AdamW for the others.

    momentum: mu. newton_schulz_steps, newton_schulz_dtype: of the approximation of O(X).
    adamw_params: shell patterns of whole names, for matrices that are no hidden maps (embedding, head, router).
    lr_scale, adamw_lr_scale: their learning rates, as multiples of the schedule's. betas, eps: AdamW's.
    weight_decay: of every matrix, in both.
    sparse_lr_scale: the learning rate of tables with sparse gradients, as a multiple of their group's: AdamW's where
        `adamw_params` names them.

    Raises ValueError where `newton_schulz_dtype` is unknown or no parameter is left to Muon.
    """
    if newton_schulz_dtype not in ("bfloat16", "float32"):
        raise ValueError(f"optimizer.newton_schulz_dtype={newton_schulz_dtype}: must be bfloat16 or float32")
    named = list(named_parameters)
    left = {name for name, p in named if p.ndim < 2 or any(fnmatchcase(name, pattern) for pattern in adamw_params)}
    hidden = [parameter for name, parameter in named if name not in left]
    if not hidden:
        raise ValueError(f"optimizer.adamw_params={list(adamw_params)}: must leave at least one matrix to Muon")
    groups = decay_groups(((name, p) for name, p in named if name in left), weight_decay=weight_decay)
    for group in groups:
        group |= {"rule": "adamw", "lr_scale": adamw_lr_scale}
    groups.insert(0, {"params": hidden, "weight_decay": weight_decay, "lr_scale": lr_scale, "rule": "muon"})
    beta1, beta2 = betas
    defaults = {
        "lr": 0.0,
        "momentum": momentum,
        "newton_schulz_steps": newton_schulz_steps,
        "newton_schulz_dtype": newton_schulz_dtype,
        "betas": (beta1, beta2),
        "eps": eps,
        "sparse_lr_scale": sparse_lr_scale,
    }
    return Muon(groups, defaults)


class Muon(PerParameter):
    """Steps each group by its `rule`, muon or adamw; the hidden matrices of one shape together."""

    def __init__(self, groups: list[dict[str, Any]], defaults: dict[str, Any]) -> None:
        super().__init__(groups, defaults)
        self.joined: Mapping[nn.Parameter, Sequence[int]] = {}

    def separate(self, joined: Mapping[nn.Parameter, Sequence[int]]) -> None:
        self.joined = joined

    def step_group(self, group: dict[str, Any], parameters: Sequence[nn.Parameter]) -> None:
        if group["rule"] == "adamw":
            return super().step_group(group, parameters)
        updates = [self.update_of(parameter, group) for parameter in parameters]
        decay, lr = 1 - group["lr"] * group["weight_decay"], group["lr"]
        if all(local(parameter) is parameter for parameter in parameters):
            self.orthogonalise(parameters, updates, group)
            for parameter, update in zip(parameters, updates):
                for weight, factor in zip(self.matrices_of(parameter, parameter), self.matrices_of(parameter, update)):
                    weight.mul_(decay)
                    weight.add_(factor.to(weight.dtype), alpha=-(lr * 0.2 * longer_side(factor) ** 0.5))
            return
        dtype = parameters[0].dtype
        steps = apply_to_whole(updates, lambda whole: self.steps_of(parameters, whole, group), dtype=dtype)
        for parameter, step in zip(parameters, steps):
            local(parameter).mul_(decay).add_(step, alpha=-lr)

    def steps_of(
        self, parameters: Sequence[nn.Parameter], whole: Mapping[int, Tensor], group: dict[str, Any]
    ) -> dict[int, Tensor]:
        """What the learning rate multiplies, of whole updates by the index of their parameter."""
        some = [parameters[i] for i in whole]
        self.orthogonalise(some, list(whole.values()), group)
        steps = {i: update.to(parameters[i].dtype) for i, update in whole.items()}
        for i, step in steps.items():
            for factor in self.matrices_of(parameters[i], step):
                factor.mul_(0.2 * longer_side(factor) ** 0.5)
        return steps

    def step_parameter(self, parameter: Tensor, gradient: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        adamw_step(parameter, gradient, state, group, moments_dtype=torch.float32)

    def update_of(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """U of a parameter, with this step's momentum, in the dtype of its Newton-Schulz steps."""
        assert parameter.grad is not None
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(parameter.grad)
        return parameter.grad.add(buffer, alpha=group["momentum"]).to(getattr(torch, group["newton_schulz_dtype"]))

    def matrices_of(self, parameter: nn.Parameter, tensor: Tensor) -> tuple[Tensor, ...]:
        """Views of the matrices that a parameter consists of, in a tensor of its shape."""
        return matrices(tensor, self.joined.get(parameter, tensor.shape[-2:-1]))

    def orthogonalise(
        self, parameters: Sequence[nn.Parameter], updates: Sequence[Tensor], group: dict[str, Any]
    ) -> None:
        """Put O(U) in the place of each U, in place; matrices, or stacks of them, of one shape together."""
        by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
        for parameter, update in zip(parameters, updates):
            for matrix in self.matrices_of(parameter, update):
                if matrix.numel():
                    by_shape[matrix.shape].append(matrix)
        for alike in by_shape.values():
            stacked = torch.stack([matrix.flatten(-3, -2) for matrix in alike])
            for matrix, factor in zip(alike, orthogonalised(stacked, steps=group["newton_schulz_steps"])):
                matrix.copy_(factor.view_as(matrix))


def longer_side(matrix: Tensor) -> int:
    """max(out, in) of a view [..., repeats, rows, in] with out = repeats * rows."""
    repeats, rows, inputs = matrix.shape[-3:]
    return max(repeats * rows, inputs)


def orthogonalised(x: Tensor, *, steps: int) -> Tensor:
    """Each matrix [..., out, in] with its singular values brought near 1 (zero stays zero), in x's dtype."""
    a, b, c = COEFFICIENTS
    tall = x.shape[-2] > x.shape[-1]  # the smaller of the two Gram matrices gives the same result for less work
    m = (x.mT if tall else x).reshape(-1, min(x.shape[-2:]), max(x.shape[-2:]))
    m = m / m.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = torch.bmm(m, m.mT)
        m = torch.baddbmm(m, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), m, beta=a)
    return (m.mT if tall else m).reshape(x.shape)
