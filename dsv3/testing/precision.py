"""Does a precision keep to `dsv3.contracts.Precision`?"""

from collections.abc import Callable
from typing import Any, get_args

import torch
from torch import Tensor, nn

from dsv3.contracts import Role
from dsv3.model.layers import cached_weight_casts
from dsv3.testing.plain import drawn, error, loop_mm
from dsv3.testing.requirement import require, require_reloadable

ROLES: tuple[Role, ...] = get_args(Role)
EXPERT_ROLES: tuple[Role, ...] = ("expert_gate_up", "expert_down")
IN, OUT = 192, 160
COUNTS = (32, 0, 64, 16)


def check_precision(factory: Callable[[], Any], *, device: str = "cpu", tolerance: float = 0.1) -> None:
    """Raise AssertionError, saying what is wrong, unless `factory()` is a precision that the core can use on `device`.

    tolerance: relative error, in the Euclidean norm, of a product against FP64 that its formats excuse.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        precision = factory()
        problems = precision.check(torch.device(device))
        require(
            isinstance(problems, list) and all(isinstance(problem, str) for problem in problems),
            f"check() must return a list of sentences, empty if nothing stands against the device; not {problems!r}",
        )
        require(not problems, f"it does not run on {device}: {' '.join(problems)}")
        require(
            isinstance(precision.activation_dtype, torch.dtype) and precision.activation_dtype.is_floating_point,
            f"activation_dtype must be a floating-point dtype, not {precision.activation_dtype!r}",
        )
        for role in ROLES:
            _linear(precision, role, torch.device(device), tolerance)
        _swiglu(precision, torch.device(device), tolerance, weighted=False)
        _swiglu(precision, torch.device(device), tolerance, weighted=True)
        for role in EXPERT_ROLES:
            _grouped(precision, role, torch.device(device), tolerance)


def _linear(precision: Any, role: Role, device: torch.device, tolerance: float) -> None:
    what = f"linear(role={role!r})"
    layer = drawn(precision.linear(IN, OUT, role=role)).to(device)
    _weight(layer, (OUT, IN), what)
    x = torch.randn(2, 24, IN, device=device).to(precision.activation_dtype)

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.mT

    _product(layer, x, (), reference, precision, what, tolerance)
    fresh = drawn(precision.linear(IN, OUT, role=role)).to(device)
    require(layer.weight is not fresh.weight, f"{what} must make a new weight each time")
    require_reloadable(layer, fresh)


def _grouped(precision: Any, role: Role, device: torch.device, tolerance: float) -> None:
    what = f"grouped_linear(role={role!r})"
    layer = drawn(precision.grouped_linear(len(COUNTS), IN, OUT, role=role, grouped_mm=loop_mm)).to(device)
    _weight(layer, (len(COUNTS), OUT, IN), what)
    counts_E = torch.tensor(COUNTS, device=device)
    x = torch.randn(sum(COUNTS), IN, device=device).to(precision.activation_dtype)

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        return loop_mm(x, weight, counts_E)

    _product(layer, x, (counts_E,), reference, precision, what, tolerance)
    require(not layer.weight.grad[1].any(), f"{what}: a group without rows must get a gradient of zero")
    fresh = drawn(precision.grouped_linear(len(COUNTS), IN, OUT, role=role, grouped_mm=loop_mm)).to(device)
    require_reloadable(layer, fresh)


def _swiglu(precision: Any, device: torch.device, tolerance: float, *, weighted: bool) -> None:
    """Value and gradients of the activation against FP64; `weighted`: times a float32 weight for each row."""
    leaf = torch.randn(2, 24, 2 * OUT, device=device).to(precision.activation_dtype).requires_grad_()
    exact = leaf.detach().double().requires_grad_()
    gates = torch.rand(2, 24, device=device).requires_grad_() if weighted else None
    exact_gates = gates.detach().double().requires_grad_() if gates is not None else None
    gate, up = exact.chunk(2, dim=-1)
    y, y64 = precision.swiglu(leaf, gates), nn.functional.silu(gate) * up
    if exact_gates is not None:
        y64 = y64 * exact_gates.unsqueeze(-1)
    require(
        y.shape == y64.shape and y.dtype == precision.activation_dtype,
        f"swiglu must give {precision.activation_dtype} {list(y64.shape)}, not {y.dtype} {list(y.shape)}",
    )
    upstream = torch.randn(y.shape, device=device).to(y.dtype)
    y.backward(upstream)
    y64.backward(upstream.double())
    compared = [("value", y, y64), ("gradient", leaf.grad, exact.grad)]
    if gates is not None and exact_gates is not None:
        compared.append(("gradient of the row weights", gates.grad, exact_gates.grad))
    function = "silu(gate) * up" + " * row_weights" * weighted
    for name, found, expected in compared:
        if found is None or expected is None:
            raise AssertionError(f"swiglu has no {name}")
        off = error(found, expected)
        require(off <= tolerance, f"swiglu: the {name} is {off:.1%} off {function}; {tolerance:.1%} is allowed")


def _weight(layer: nn.Module, shape: tuple[int, ...], what: str) -> None:
    parameters = dict(layer.named_parameters())
    require(
        list(parameters) == ["weight"], f"{what} must have one parameter, `weight`, and no bias; not {list(parameters)}"
    )
    weight = parameters["weight"]
    require(
        weight.dtype == torch.float32 and weight.shape == shape,
        f"{what}: the master weight must be float32 {list(shape)}, not {weight.dtype} {list(weight.shape)}",
    )


def _product(
    layer: Any,
    x: Tensor,
    more: tuple[Tensor, ...],
    reference: Callable[[Tensor, Tensor], Tensor],
    precision: Any,
    what: str,
    tolerance: float,
) -> None:
    """Output, input gradient and weight gradient against FP64; accumulation of the latter."""
    leaf = x.clone().requires_grad_()
    y = layer(leaf, *more)
    x64, w64 = x.double().requires_grad_(), layer.weight.detach().double().requires_grad_()
    y64 = reference(x64, w64)
    require(
        y.shape == y64.shape and (y.dtype == precision.activation_dtype or "head" in what),
        f"{what} must give {precision.activation_dtype} {list(y64.shape)} for {list(x.shape)}, "
        f"not {y.dtype} {list(y.shape)}",
    )
    upstream = torch.randn(y.shape, device=y.device).to(y.dtype)
    y.backward(upstream)
    y64.backward(upstream.double())
    for name, found, expected in (
        ("the output", y, y64),
        ("the gradient of the input", leaf.grad, x64.grad),
        ("the gradient of the weight", layer.weight.grad, w64.grad),
    ):
        if found is None or expected is None:
            raise AssertionError(f"{what}: {name} is missing")
        off = error(found, expected)
        require(off <= tolerance, f"{what}: {name} is {off:.1%} off the exact product; {tolerance:.1%} is allowed")
    once = layer.weight.grad.clone()
    require(
        once.dtype == torch.float32,
        f"{what}: the weight's gradient must be float32, in which micro-batches are summed, not {once.dtype}",
    )
    layer(x.clone().requires_grad_(), *more).backward(upstream)
    require(
        error(layer.weight.grad, 2 * once) <= 0.01, f"{what}: gradients of a second micro-batch must be added in full"
    )
    with torch.no_grad():
        require(
            error(layer(x, *more), y) <= 0.01, f"{what} must give the same without gradients (validation, generation)"
        )
    _held(layer, x, more, y, upstream, once, what)


def _held(
    layer: Any, x: Tensor, more: tuple[Tensor, ...], y: Tensor, upstream: Tensor, gradient: Tensor, what: str
) -> None:
    """Two micro-batches while the weight is held, and a step after it."""
    layer.weight.grad = None
    with cached_weight_casts(layer):
        for _ in range(2):
            held_y = layer(x.clone().requires_grad_(), *more)
            held_y.backward(upstream)
            require(error(held_y, y) <= 0.01, f"{what} must give the same while its weight is held")
    require(
        error(layer.weight.grad, 2 * gradient) <= 0.01,
        f"{what}: two backward passes while the weight is held must add up to the gradients without it",
    )
    with torch.no_grad():
        layer.weight.mul_(2)
        require(error(layer(x, *more), 2 * y) <= 0.01, f"{what} must forget what it held of an older weight")
