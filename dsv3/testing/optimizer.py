"""Does an optimiser keep to `dsv3.contracts.OptimizerFactory`?"""

import io
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dsv3.contracts import StepsMatrices
from dsv3.model.layers import matrices
from dsv3.testing.requirement import require

RATE = 0.01
SHAPES = {
    "embed_tokens.weight": (20, 6),
    "layers.0.self_attn.o_proj.weight": (6, 8),
    "layers.0.mlp.experts.down_proj.weight": (3, 6, 4),
    "norm.weight": (6,),
    "lm_head.weight": (20, 6),
}
TABLE = "memory.tables.0.weight"  # of 30 rows; its gradients are sparse
Named = list[tuple[str, nn.Parameter]]


def check_optimizer(factory: Callable[..., torch.optim.Optimizer]) -> None:
    """Raise AssertionError, saying what is wrong, unless `factory(named_parameters)` is an optimiser for the core.

    It is given parameters named and shaped like a model's, from embedding to head, and a table of a memory.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        start = {name: torch.randn(shape) for name, shape in {**SHAPES, TABLE: (30, 4)}.items()}
        _groups(factory, start)
        _descends(factory, start)
        _rate(factory, start)
        _without_gradients(factory, start)
        _resumes(factory, start)
        _separates(factory)


def _made(factory: Callable[..., Any], start: dict[str, Tensor]) -> tuple[torch.optim.Optimizer, Named]:
    named = [(name, nn.Parameter(value.clone())) for name, value in start.items()]
    return factory(iter(named)), named


def _step(optimizer: torch.optim.Optimizer, named: Named, number: int, *, rate: float) -> None:
    """One step as the core makes it: gradients of |p - target|^2 / 2, the groups' rates, the step."""
    for (name, parameter), target in zip(named, _targets(named), strict=True):
        gradient = (parameter - target).detach()
        if name == TABLE:  # two rows a step, one of them twice
            rows = torch.tensor([[number % 30, number % 30, 29 - number % 15]])
            gradient = torch.sparse_coo_tensor(rows, gradient[rows[0]] / 2, parameter.shape)
        parameter.grad = gradient
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
    optimizer.step()
    optimizer.zero_grad()


def _targets(named: Named) -> Iterator[Tensor]:
    for _, parameter in named:
        yield torch.linspace(-1, 1, parameter.numel()).view_as(parameter)


def _groups(factory: Callable[..., Any], start: dict[str, Tensor]) -> None:
    optimizer, named = _made(factory, start)
    require(isinstance(optimizer, torch.optim.Optimizer), "the factory must give a torch.optim.Optimizer")
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    for name, parameter in named:
        times = held.count(id(parameter))
        require(times == 1, f"{name} is in {times} groups: every parameter must be in exactly one")
    require(len(held) == len(named), "the groups hold parameters that were not given")


def _descends(factory: Callable[..., Any], start: dict[str, Tensor]) -> None:
    optimizer, named = _made(factory, start)
    targets = list(_targets(named))
    before = [float((p.detach() - target).norm()) for (_, p), target in zip(named, targets, strict=True)]
    for number in range(60):
        _step(optimizer, named, number, rate=RATE)
    for (name, parameter), target, distance in zip(named, targets, before, strict=True):
        after = float((parameter.detach() - target).norm())
        require(
            after < 0.98 * distance,
            f"60 steps on |p - target|^2 / 2 must bring {name} nearer to its target; from {distance:.3f} it went to "
            f"{after:.3f}" + " (its gradients are sparse)" * (name == TABLE),
        )


def _rate(factory: Callable[..., Any], start: dict[str, Tensor]) -> None:
    moved = {}
    for rate in (0.0, RATE, 2 * RATE):
        optimizer, named = _made(factory, start)
        _step(optimizer, named, 0, rate=rate)
        moved[rate] = {name: float((p.detach() - start[name]).norm()) for name, p in named}
    for name in start:
        require(
            moved[0.0][name] == 0,
            f"a step with `lr` 0 must change nothing, and it moved {name}: take the rate from the group's `lr`, which "
            "the core sets before each step",
        )
        require(
            moved[2 * RATE][name] > 1.5 * moved[RATE][name] > 0,
            f"with twice the `lr` in its group, {name} must move about twice as far; it moved {moved[RATE][name]:.2g} "
            f"and {moved[2 * RATE][name]:.2g}",
        )


def _without_gradients(factory: Callable[..., Any], start: dict[str, Tensor]) -> None:
    optimizer, named = _made(factory, start)
    for group in optimizer.param_groups:
        group["lr"] = RATE * group.get("lr_scale", 1.0)
    optimizer.step()
    for name, parameter in named:
        require(
            torch.equal(parameter.detach(), start[name]), f"{name} has no gradient and must be left alone; it moved"
        )


def _separates(factory: Callable[..., Any]) -> None:
    """Two matrices in one weight, interleaved in pairs of rows and single ones, next to the same two by themselves."""
    start, rows = torch.randn(2, 9, 5), (2, 1)
    moved = []
    for joined in (True, False):
        parts = [start] if joined else [part.flatten(-3, -2) for part in matrices(start, rows)]
        optimizer, named = _made(factory, {f"layers.{i}.proj.weight": part for i, part in enumerate(parts)})
        if not isinstance(optimizer, StepsMatrices):
            return
        optimizer.separate({parameter: rows for _, parameter in named} if joined else {})
        for _, parameter in named:
            parameter.grad = parameter.detach().sin()
        for group in optimizer.param_groups:
            group["lr"] = RATE * group.get("lr_scale", 1.0)
        optimizer.step()
        moved.append([parameter.detach() for _, parameter in named])
    (whole,), apart = moved
    for part, expected in zip(matrices(whole, rows), apart, strict=True):
        require(
            torch.allclose(part.flatten(-3, -2), expected, atol=1e-4),
            "a weight that joins matrices, as `separate` was told, must step as these matrices do by themselves",
        )


def _resumes(factory: Callable[..., Any], start: dict[str, Tensor]) -> None:
    """Three steps, a checkpoint as Lightning writes it, and three more in both runs."""
    optimizer, named = _made(factory, start)
    for number in range(3):
        _step(optimizer, named, number, rate=RATE)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    try:
        state = torch.load(file, weights_only=True)
    except Exception as error:
        raise AssertionError(
            f"state_dict() must hold tensors and plain containers only: checkpoints execute nothing ({error})"
        ) from error
    resumed, restored = _made(factory, {name: parameter.detach() for name, parameter in named})
    resumed.load_state_dict(state)
    for number in range(3, 6):
        _step(optimizer, named, number, rate=RATE)
        _step(resumed, restored, number, rate=RATE)
    for (name, parameter), (_, other) in zip(named, restored, strict=True):
        require(
            torch.equal(parameter, other),
            f"{name} differs three steps after load_state_dict(state_dict()): a resumed run must go on bit for bit; "
            "keep all state in `optimizer.state` and the groups",
        )
