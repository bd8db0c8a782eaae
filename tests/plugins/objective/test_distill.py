"""Distillation: no divergence from oneself, the mean over teachers, sampled and given replies."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from dsv3.build import build_model
from dsv3.contracts import IGNORE, JudgesHeldOut, MicroBatch, Prompt, Rollout, Step, Turn
from dsv3.model.decoder import Decoder
from dsv3.testing.small_model import micro_batch
from dsv3.training.step import Losses, held_out_figures
from plugins.objective.distill import Distill

V = 262
Compose = Callable[..., DictConfig]


def distill(**settings: Any) -> Distill:
    defaults: dict[str, Any] = {
        "teachers": None, "direction": "reverse", "seed": 1, "sequence_length": 24, "micro_batch_size": 4,
        "samples": 2, "max_tokens": 6, "temperature": 1.0,
    }  # fmt: skip
    return Distill(token_bytes_V=torch.ones(V), **{**defaults, **settings})


class Models:
    """A policy, and other models by name; None is the one that training began with."""

    def __init__(self, policy: Decoder, **others: nn.Module) -> None:
        self.policy, self.others = policy, others

    def reference(self) -> nn.Module:
        return self.others["start"]

    def teacher(self, run: str) -> nn.Module:
        return self.others[run]

    def sample(self, prompts: Sequence[Prompt], seeds: Sequence[int], **settings: Any) -> list[Rollout]:
        asked = zip(prompts, seeds, strict=True)
        return [Rollout([Turn(prompt.ids, [40 + seed % 3, 50], "x", True, [0.0, 0.0])]) for prompt, seed in asked]


@pytest.fixture(scope="module")
def models(composed: Compose) -> Models:
    """The second teacher is narrower."""
    settings = ("precision=fp32", "mtp=none", "data.isolate_documents=true")
    policy, first = (build_model(composed(*settings, f"seed={seed}")) for seed in (1, 2))
    return Models(policy, start=policy, first=first, second=build_model(composed(*settings, "seed=3", "model.dim=32")))


def given() -> Step:
    return Step([micro_batch(4, 16, seed=0)], 0, {})


def prompts() -> Step:
    return Step([], 0, {}, prompts=[Prompt([1, 2, 3], "abc", {}, 7), Prompt([4, 5], "de", {}, 8)])


def loss_of(objective: Distill, step: Step, models: Models) -> tuple[Tensor, dict[str, Tensor], Step]:
    """Of a step, its sums, and the step as it was prepared; gradients are left at the policy."""
    with torch.no_grad():
        step = objective.prepare(step, models)  # type: ignore[arg-type]
    denominators, policy = objective.denominators(step), models.policy
    policy.zero_grad()
    total, sums = torch.zeros(()), {}
    for micro in step.micro_batches:
        term = objective.loss(policy(micro, with_mtp=False), policy.head(), micro, denominators)
        total = total + term.loss
        sums = {name: sums.get(name, 0.0) + value for name, value in term.sums.items()}
    total.backward()
    return total.detach(), {**sums, **denominators}, step


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("step", [given, prompts], ids=["given", "sampled"])
def test_the_divergence_from_oneself_is_zero(models: Models, direction: str, step: Callable[[], Step]) -> None:
    loss, _, _ = loss_of(distill(direction=direction), step(), models)
    assert loss.abs() < 1e-6
    assert all(p.grad is None or p.grad.abs().max() < 1e-5 for p in models.policy.parameters())


def log_probs(model: nn.Module, micro: MicroBatch) -> Tensor:
    with torch.no_grad():
        decoder: Any = model
        return (decoder(micro, with_mtp=False).hidden_BTD @ decoder.head_weight.T).log_softmax(-1)


@pytest.mark.parametrize("direction", ["reverse", "forward"])
@pytest.mark.parametrize("step", [given, prompts], ids=["given", "sampled"])
def test_several_teachers_of_any_width_count_alike(models: Models, direction: str, step: Callable[[], Step]) -> None:
    loss, sums, prepared = loss_of(distill(direction=direction, teachers=["first", "second"]), step(), models)
    expected, targets = 0.0, 0
    for micro in prepared.micro_batches:
        ours, real_BT = log_probs(models.policy, micro), micro.targets_BT != IGNORE
        targets += int(real_BT.sum())
        for name in ("first", "second"):
            theirs = log_probs(models.others[name], micro)
            p, q = (ours, theirs) if direction == "reverse" else (theirs, ours)
            expected += float((p.exp() * (p - q)).sum(-1)[real_BT].sum()) / 2
    assert int(sums["targets"]) == targets
    assert float(loss) == pytest.approx(expected / targets, rel=1e-4)
    assert expected > 0.1
    assert any(p.grad is not None and p.grad.any() for p in models.policy.parameters())
    assert all(p.grad is None for name in ("first", "second") for p in models.others[name].parameters())


def test_with_prompts_the_policy_writes_the_answers_and_with_conversations_they_are_given(models: Models) -> None:
    _, sums, step = loss_of(distill(), prompts(), models)
    assert [row["prompt"] for row in step.rollouts] == ["abc", "abc", "de", "de"]
    assert (int(sums["answers"]), int(sums["ended"]), int(sums["answer_tokens"])) == (4, 4, 8)
    _, sums, step = loss_of(distill(), given(), models)
    assert torch.equal(step.micro_batches[0].targets_BT, given().micro_batches[0].targets_BT)
    assert int(sums["answers"]) == 0
    assert not step.rollouts


def test_settings_that_cannot_be_are_named() -> None:
    for settings, words in (({"teachers": []}, r"teachers=\[\]"), ({"direction": "up"}, "direction=up")):
        with pytest.raises(ValueError, match=words):
            distill(**settings)


def test_held_out_rows_are_judged_by_the_divergence_on_the_replies_that_they_give(models: Models) -> None:
    objective = distill(teachers=["first"])
    assert isinstance(objective, JudgesHeldOut)
    rows = [micro_batch(4, 16, seed=seed) for seed in (0, 1)]
    loss, sums, _ = loss_of(objective, Step(rows, 0, {}), models)
    found = held_out_figures(Losses(models.policy, objective), models, rows, objective.held_out_figures, 0)  # type: ignore[arg-type]
    assert found == {
        "loss": pytest.approx(float(loss), rel=1e-5),
        "nll": pytest.approx(float(sums["nll"] / sums["targets"]), rel=1e-5),
    }
    assert found["loss"] > 0.01
