"""A model in pipeline stages gives the gradients, loads and outputs of the same model in one process."""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor

from dsv3.build import build_model
from dsv3.contracts import Forward, Head, MicroBatch, Routing, Step
from dsv3.distributed.pipeline import Pipeline, ScheduleName
from dsv3.model.decoder import Decoder
from dsv3.model.load import Loads, real_tokens
from dsv3.testing.small_model import micro_batch
from dsv3.training.step import Losses, Sums, take_gradients, tokens_of
from plugins.objective.pretraining import Pretraining
from tests.distributed.workers import Workers

Compose = Callable[..., DictConfig]
SCHEDULES: tuple[ScheduleName, ...] = ("1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev")
SHAPES = ("balancing=sequence_aux", "balancing.alpha=0.1", "mtp.weight.peak=1.0")
"""Large balance and MTP losses, so that a gradient without theirs is seen."""


class Outcome(NamedTuple):
    """Of a step."""

    gradients: dict[str, Tensor]
    loads: dict[str, Tensor]
    calls: Counter[str]  # forward passes of each MoE layer's router


def step_of(config: DictConfig, number: int) -> Step:
    return Step([micro_batch(2, 16, seed=seed) for seed in range(number)], 64, {})


def objective_of(config: DictConfig) -> Pretraining:
    return Pretraining(token_bytes_V=torch.ones(config.model.vocab_size, dtype=torch.int64))


def router_calls(model: Decoder) -> Counter[str]:
    calls: Counter[str] = Counter()
    for name, moe in model.moe_layers():
        moe.router.register_forward_hook(lambda *_, name=name: calls.update([name]))  # type: ignore[attr-defined]
    return calls


def gradients_of(model: Decoder) -> dict[str, Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {name: (grad.to_dense() if grad.is_sparse else grad) for name, grad in found.items() if grad is not None}


class Share:
    """The losses of a step as a pipeline asks for them, of a model before it is cut."""

    def __init__(self, model: Decoder, config: DictConfig, step: Step) -> None:
        self.losses, self.step = Losses(model, objective_of(config)), step
        self.moe = dict(model.moe_layers())
        tokens = torch.stack([tokens_of(micro) for micro in step.micro_batches]).sum()
        self.denominators = {**self.losses.objective.denominators(step), "tokens": tokens}

    def loss(self, forward: Forward, head: Head, micro: MicroBatch) -> Tensor:
        loss = self.losses.objective.loss(forward, head, micro, self.denominators).loss
        for part in self.losses.parts:
            loss = loss + part.auxiliary_loss(forward, head, micro, self.denominators, self.step.tokens_before).loss
        return loss + self.balance(forward.routings, micro)

    def balance(self, routings: dict[str, Routing], micro: MicroBatch) -> Tensor:
        total = torch.zeros(())
        for name, routing in routings.items():
            mask_BS = real_tokens(micro, routing)
            shape = (mask_BS.shape[0], mask_BS.shape[1])
            total = total + self.moe[name].balancing.loss(routing, shape, mask_BS, self.step.tokens_before)
        return total * tokens_of(micro) / self.denominators["tokens"]


def alone(config: DictConfig, number: int) -> Outcome:
    model = build_model(config)
    calls = router_calls(model)
    sums: Sums = take_gradients(Losses(model, objective_of(config)), step_of(config, number))
    return Outcome(gradients_of(model), sums.loads.by_layer(), calls)


def staged(config: DictConfig, number: int, schedule: ScheduleName, recompute: tuple[str, ...]) -> Outcome:
    """Of this rank's stages."""
    model, step = build_model(config), step_of(config, number)
    share = Share(model, config, step)
    pipeline = Pipeline(model, group=dist.group.WORLD, schedule=schedule)
    calls = router_calls(model)
    routings = pipeline.step(step.micro_batches, share.loss, share.balance, recompute=recompute)
    loads = Loads.zeros({name: moe.balancing.bias.numel() for name, moe in model.moe_layers()}, model.device)
    for micro, of_micro in zip(step.micro_batches, routings, strict=True):
        loads.add(micro, of_micro)
    return Outcome(gradients_of(model), loads.by_layer(), calls)


def largest_error(parts: list[Outcome], whole: Outcome) -> float:
    """Of any gradient, relative to the largest of its tensor; every gradient is on one rank, and every load is equal."""
    names = [name for part in parts for name in part.gradients]
    assert sorted(names) == sorted(whole.gradients)
    loads = {name: load for part in parts for name, load in part.loads.items()}
    assert loads.keys() == whole.loads.keys()
    assert all(torch.equal(load, whole.loads[name]) for name, load in loads.items())
    assert sum((part.calls for part in parts), Counter()) == whole.calls
    errors = [0.0]
    for part in parts:
        for name, grad in part.gradients.items():
            expected = whole.gradients[name]
            errors.append(float((grad - expected).abs().max() / expected.abs().max().clamp(min=1e-12)))
    return max(errors)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_and_loads_are_those_of_one_process(workers: Workers, composed: Compose, schedule: str) -> None:
    config = composed("precision=fp32", "model.n_layers=4", *SHAPES)
    (whole,) = workers.run(alone, config, 6, ranks=1)
    parts = workers.run(staged, config, 6, schedule, (), ranks=2)
    error = largest_error(parts, whole)
    print(schedule, error)
    assert error < 1e-6
