"""Do experts keep to `dsv3.contracts.Experts`?"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dsv3.testing.plain import Plain, drawn, error
from dsv3.testing.requirement import require, require_joined, require_meta, require_reloadable

ROUNDING = 1e-4  # relative, of FP32 sums in another order


def check_experts(factory: Callable[..., nn.Module], *, dim: int, n_experts: int) -> None:
    """Raise AssertionError, saying what is wrong, unless `factory(precision=...)` makes experts for the core.

    dim, n_experts: what the factory was given; at least 3 experts.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        precision = Plain(torch.float32)
        require_meta(lambda: factory(precision=precision))
        experts = factory(precision=precision)
        require(isinstance(experts, nn.Module), "experts are an nn.Module")
        numbers = sum(parameter.numel() for parameter in experts.parameters())
        require(
            numbers > 0 and numbers % n_experts == 0,
            f"each of {n_experts} experts must have an equal part of the parameters, and there are {numbers}: active "
            "parameters are counted so",
        )
        require(
            bool(precision.roles) and set(precision.roles) <= {"expert_gate_up", "expert_down"},
            "the layers must be made by the `grouped_linear` of the precision that is given, with the roles "
            f"expert_gate_up and expert_down: formats are chosen there; asked for were {precision.roles}",
        )
        drawn(experts)
        counts_E = torch.arange(n_experts) % 5  # some get nothing
        x_MD = torch.randn(int(counts_E.sum()), dim)
        _shapes(experts, factory, x_MD, counts_E)
        _own_expert(experts, x_MD, counts_E)
        _order(experts, x_MD, counts_E)
        _gates(experts, x_MD, counts_E)
        _gradients(experts, x_MD, counts_E)
        _state(experts, factory, x_MD, counts_E)


def _open(x_MD: Tensor) -> Tensor:
    """Gates of 1."""
    return torch.ones(len(x_MD))


def _shapes(experts: Any, factory: Callable[..., nn.Module], x_MD: Tensor, counts_E: Tensor) -> None:
    lower = drawn(factory(precision=Plain(torch.bfloat16)))
    with torch.no_grad():
        for module, x, counts in (
            (experts, x_MD, counts_E),
            (lower, x_MD.bfloat16(), counts_E),
            (experts, x_MD[:0], torch.zeros_like(counts_E)),
        ):
            y = module(x, counts, _open(x))
            require(
                y.shape == x.shape and y.dtype == x.dtype,
                f"the output for {len(x)} rows must be {x.dtype} {list(x.shape)}, not {y.dtype} {list(y.shape)}",
            )
            require(y.isfinite().all(), f"the output of {x.dtype} has values that are not finite")


def _own_expert(experts: Any, x_MD: Tensor, counts_E: Tensor) -> None:
    """Each expert's rows by themselves, and the same rows given to another expert."""
    with torch.no_grad():
        together = experts(x_MD, counts_E, _open(x_MD)).split(counts_E.tolist())
        for expert, (x, y) in enumerate(zip(x_MD.split(counts_E.tolist()), together, strict=True)):
            if not len(x):
                continue
            alone = torch.zeros_like(counts_E)
            alone[expert] = len(x)
            require(
                error(experts(x, alone, _open(x)), y) <= ROUNDING,
                f"the rows of expert {expert} must not depend on the rows of the others: the first counts_E[0] rows "
                "are expert 0's, and so on",
            )
            other = alone.roll(1)
            require(
                error(experts(x, other, _open(x)), y) > ROUNDING,
                f"expert {expert} and its neighbour give the same output: each expert has weights of its own",
            )


def _order(experts: Any, x_MD: Tensor, counts_E: Tensor) -> None:
    parts = x_MD.split(counts_E.tolist())
    with torch.no_grad():
        plain = torch.cat([part.flip(0) for part in experts(x_MD, counts_E, _open(x_MD)).split(counts_E.tolist())])
        flipped = experts(torch.cat([part.flip(0) for part in parts]), counts_E, _open(x_MD))
    require(error(flipped, plain) <= ROUNDING, "a row's output must not depend on its place among its expert's rows")


def _gates(experts: Any, x_MD: Tensor, counts_E: Tensor) -> None:
    """Gates multiply rows, and their gradients are the rows' products with the upstream gradient."""
    with torch.no_grad():
        plain = experts(x_MD, counts_E, _open(x_MD))
    gates_M = torch.rand(len(x_MD), requires_grad=True)
    gated, upstream = experts(x_MD, counts_E, gates_M), torch.randn_like(plain)
    require(
        error(gated, plain * gates_M.unsqueeze(1)) <= ROUNDING, "a row's output must be multiplied by the row's gate"
    )
    gated.backward(upstream)
    require(
        gates_M.grad is not None and error(gates_M.grad, (plain * upstream).sum(-1)) <= ROUNDING,
        "the gradient of a gate must be its row's ungated output times the upstream gradient",
    )
    experts.zero_grad()


def _gradients(experts: Any, x_MD: Tensor, counts_E: Tensor) -> None:
    leaf = x_MD.clone().requires_grad_()
    experts(leaf, counts_E, _open(x_MD)).square().sum().backward()
    for name, tensor in [("the input", leaf), *experts.named_parameters()]:
        require(
            tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.any(),
            f"{name} must get a gradient that is finite and not zero",
        )
        if tensor is leaf or tensor.shape[:1] != counts_E.shape:
            continue
        for expert, gradient in enumerate(tensor.grad):
            require(
                bool(gradient.any()) == bool(counts_E[expert]),
                f"{name}[{expert}] must get a gradient exactly if expert {expert} has rows",
            )


def _state(experts: Any, factory: Callable[..., nn.Module], x_MD: Tensor, counts_E: Tensor) -> None:
    fresh = drawn(factory(precision=Plain(torch.float32)))
    require(
        not {id(p) for p in experts.parameters()} & {id(p) for p in fresh.parameters()},
        "the factory must make new parameters each time: every layer has experts of its own",
    )
    require_reloadable(experts, fresh)
    require_joined(experts)
    with torch.no_grad():
        require(
            torch.equal(fresh(x_MD, counts_E, _open(x_MD)), experts(x_MD, counts_E, _open(x_MD))),
            "experts restored from a state_dict must compute like those saved",
        )
