"""Does an objective keep to `dsv3.contracts.Objective`?"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dsv3.contracts import IGNORE, Forward, Head, LossTerm, MicroBatch, Prompt, Rollout, Statistic, Step, Turn
from dsv3.testing.plain import error
from dsv3.testing.requirement import require
from dsv3.testing.small_model import DIM, VOCABULARY, micro_batch, small_model

ROWS, LENGTH = 8, 6
ROUNDING = 1e-4  # relative, of FP32 sums in another order


class SmallModels:
    """`dsv3.contracts.Models` of small models with random weights, for checks without a run."""

    def __init__(self) -> None:
        self.policy = small_model()

    def reference(self) -> nn.Module:
        return self.policy

    def teacher(self, run: str) -> nn.Module:
        return self.policy

    def sample(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], *, max_tokens: int, temperature: float, experts: bool
    ) -> list[Rollout]:
        """Random bytes, of which every other text ends by itself."""
        found = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            ids = torch.randint(97, 123, (max_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
            found.append(Rollout([Turn(prompt.ids, ids, bytes(ids).decode(), seed % 2 == 0, [-1.0] * len(ids))]))
        return found

    def log_probs(self, model: nn.Module, micro: MicroBatch, *, temperature: float = 1.0) -> Tensor:
        return torch.zeros(micro.targets_BT.shape).masked_fill(micro.targets_BT != IGNORE, -1.0)


class _Outcome(NamedTuple):
    """A step's loss and its gradients; what is summed, with the denominators."""

    loss: Tensor
    hidden_BTD: Tensor
    weight_VD: Tensor
    sums: Mapping[str, Tensor]


def check_objective(factory: Callable[..., nn.Module], *, step: Step | None = None) -> None:
    """Raise AssertionError, saying what is wrong, unless `factory(token_bytes_V=)` is an objective for the core.

    step: what it is asked about, of one vocabulary of 262 tokens: the micro-batch that it makes of it, or the only one
    that it has, has 8 rows. None: rows of tokens like those of pretraining.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        objective = factory(token_bytes_V=torch.randint(0, 9, (VOCABULARY,)))
        require(isinstance(objective, nn.Module), "an objective is an nn.Module, whose buffers move with the model")
        require(not list(objective.parameters()), "an objective has no parameters: none would be trained")
        _statistics(objective)
        step = _prepared(objective, step or Step([micro_batch(ROWS, LENGTH, seed=0)], 0, {}))
        _denominators(objective, step)
        shape = step.micro_batches[0].tokens_BT.shape
        hidden_BTD, weight_VD = torch.randn(*shape, DIM), torch.randn(VOCABULARY, DIM)
        whole = _outcome(objective, step.micro_batches, hidden_BTD, weight_VD)
        _gradients(whole)
        _shares(objective, step.micro_batches[0], whole, hidden_BTD, weight_VD)
        _ignored(objective, step.micro_batches[0], whole, hidden_BTD, weight_VD)


def _statistics(objective: Any) -> None:
    statistics = list(objective.statistics)
    require(
        bool(statistics) and all(isinstance(figure, Statistic) for figure in statistics),
        "`statistics` must be dsv3.contracts.Statistic, at least one",
    )
    names = [figure.name for figure in statistics]
    require(
        names[0] == "loss",
        f"the first of `statistics` must be called loss, which the guard judges and studies compare; not {names[0]}",
    )
    require(len(set(names)) == len(names), f"`statistics` must have different names, not {names}")


def _prepared(objective: Any, given: Step) -> Step:
    with torch.no_grad():
        step = objective.prepare(given, SmallModels())
    require(isinstance(step, Step), f"prepare() must return the Step to train on, not {type(step).__name__}")
    return step


def _denominators(objective: Any, step: Step) -> None:
    found = objective.denominators(step)
    require(
        "mtp" in found,
        f"denominators() must give `mtp`, which MTP's losses are divided by; it gives {', '.join(found)}",
    )
    require("tokens" not in found, "denominators() must not give `tokens`: the core adds it")
    for name, value in found.items():
        require(
            isinstance(value, Tensor) and value.shape == () and not value.requires_grad,
            f"denominators()[{name!r}] must be a scalar tensor without a gradient, not {value!r}",
        )
    nothing = objective.denominators(step._replace(micro_batches=[step.micro_batches[0].padding()]))["mtp"]
    require(
        float(nothing) == 0,
        f"denominators()['mtp'] of padding alone must be 0, not {float(nothing):g}: ranks add up their shares, "
        "and one may have nothing; the loss may divide by the sum's clamp(min=1)",
    )


def _outcome(objective: Any, parts: list[MicroBatch], hidden_BTD: Tensor, weight_VD: Tensor) -> _Outcome:
    """The step of these micro-batches, whose rows are those of `hidden_BTD` in order, as the core takes it."""
    step = Step(parts, 0, {})
    hidden_BTD, weight_VD = hidden_BTD.clone().requires_grad_(), weight_VD.clone().requires_grad_()
    denominators = {name: value.double() for name, value in objective.denominators(step).items()}
    head, total, sums = Head(weight_VD, weight_VD.detach()), torch.zeros(()), dict(denominators)
    hidden_of = hidden_BTD.split([len(micro.tokens_BT) for micro in parts])
    for micro, hidden in zip(parts, hidden_of, strict=True):
        term = objective.loss(Forward(hidden, [], {}), head, micro, denominators)
        _term(objective, term, denominators)
        total = total + term.loss
        for name, value in term.sums.items():
            sums[name] = sums.get(name, 0.0) + value.double()
    gradients = torch.autograd.grad(total, [hidden_BTD, weight_VD], allow_unused=True)
    for name, gradient in zip(("the hidden states", "the head's weight"), gradients, strict=True):
        require(gradient is not None, f"no gradient of the loss arrives at {name}")
    hidden_gradient, weight_gradient = gradients
    return _Outcome(total.detach(), hidden_gradient, weight_gradient, sums)


def _term(objective: Any, term: LossTerm, denominators: Mapping[str, Tensor]) -> None:
    require(
        isinstance(term, LossTerm) and term.loss.shape == () and term.loss.requires_grad,
        "loss() must return a LossTerm whose `loss` is a scalar with a gradient",
    )
    require(term.loss.isfinite(), f"loss() is {term.loss.item()}")
    for name, value in term.sums.items():
        require(
            isinstance(value, Tensor) and value.shape == () and not value.requires_grad,
            f"`sums[{name!r}]` must be a scalar tensor without a gradient: it is kept for the whole step",
        )
        require(name not in denominators, f"`sums` and the denominators both have {name!r}: give them two names")
    known = term.sums.keys() | denominators.keys() | {"tokens"}
    for figure in objective.statistics:
        for name in (figure.total, figure.over):
            require(
                name is None or name in known,
                f"the statistic {figure.name} is made of {name!r}, and neither `sums` nor the denominators have it",
            )


def _gradients(whole: _Outcome) -> None:
    for name, gradient in (("hidden states", whole.hidden_BTD), ("head's weight", whole.weight_VD)):
        require(
            gradient.isfinite().all() and gradient.any(),
            f"the gradient of the {name} must be finite and not zero",
        )


def _shares(objective: Any, rows: MicroBatch, whole: _Outcome, hidden_BTD: Tensor, weight_VD: Tensor) -> None:
    """The same rows as micro-batches of two and of unequal numbers of rows."""
    for sizes in ([2] * 4, [1, 5, 2]):
        numbers = torch.arange(ROWS).split(sizes)
        parts = [rows.map(functools.partial(torch.index_select, dim=0, index=of_part)) for of_part in numbers]
        split = _outcome(objective, parts, hidden_BTD, weight_VD)
        for name, found, expected in (
            ("losses", split.loss, whole.loss),
            ("gradients", split.hidden_BTD, whole.hidden_BTD),
            ("gradients of the head", split.weight_VD, whole.weight_VD),
        ):
            require(
                error(found, expected) <= ROUNDING,
                f"cut into micro-batches of {sizes} rows, the {name} must add up to those of the rows together: divide "
                "by the denominators that are given, which are of the whole step",
            )
        for name, expected in whole.sums.items():
            require(
                error(split.sums[name], expected) <= ROUNDING,
                f"cut into micro-batches of {sizes} rows, {name!r} must add up to that of the rows together",
            )


def _ignored(objective: Any, rows: MicroBatch, whole: _Outcome, hidden_BTD: Tensor, weight_VD: Tensor) -> None:
    """States at positions without a target, padding among them."""
    ignored_BT = rows.targets_BT == IGNORE
    for tensor in rows.extra.values():
        if not tensor.is_floating_point():  # targets that only the objective reads
            ignored_BT = ignored_BT & (tensor == IGNORE)
    require(not whole.hidden_BTD[ignored_BT].any(), "positions without a target (IGNORE) must get no gradient")
    other_BTD = hidden_BTD.clone()
    other_BTD[ignored_BT] = 3 * torch.randn(int(ignored_BT.sum()), DIM)
    other = _outcome(objective, [rows], other_BTD, weight_VD)
    for name, expected in {"the loss": whole.loss, **whole.sums}.items():
        found = other.loss if name == "the loss" else other.sums[name]
        require(error(found, expected) <= ROUNDING, f"positions without a target (IGNORE) must have no part in {name}")
