"""A model in pipeline stages gives the gradients, loads and outputs of the same model in one process."""

import gc
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, get_args

import pytest
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor
from torch.distributed.tensor import DTensor

from dsv3.build import build_model
from dsv3.contracts import Forward, Head, MicroBatch, Routing, Step
from dsv3.distributed.mesh import make_mesh
from dsv3.distributed.parallel import Sizes
from dsv3.distributed.pipeline import Pipeline, ScheduleName
from dsv3.distributed.shard import release, shard
from dsv3.model.decoder import Decoder
from dsv3.model.load import Loads, real_tokens
from dsv3.model.recompute import Part
from dsv3.testing.small_model import micro_batch
from dsv3.training.step import Losses, Sums, take_gradients, tokens_of
from plugins.objective.pretraining import Pretraining
from tests.distributed.workers import Workers

Compose = Callable[..., DictConfig]
PARTS = get_args(Part)
SCHEDULES: tuple[ScheduleName, ...] = ("1f1b", "interleaved_1f1b", "interleaved_zero_bubble", "zbv", "dualpipev")
LOSSES = ("balancing=sequence_aux", "balancing.alpha=0.1", "mtp.weight.peak=1.0")
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


def loads_of(model: Decoder, micro_batches: Sequence[MicroBatch], routings: Sequence[dict[str, Routing]]) -> Loads:
    loads = Loads.zeros({name: moe.balancing.bias.numel() for name, moe in model.moe_layers()}, model.device)
    for micro, of_micro in zip(micro_batches, routings, strict=True):
        loads.add(micro, of_micro)
    return loads


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
    return Outcome(gradients_of(model), loads_of(model, step.micro_batches, routings).by_layer(), calls)


def largest_error(parts: list[Outcome], whole: Outcome) -> float:
    """Of any gradient, relative to the largest of its tensor. Every gradient is on one rank, every load is equal, and
    every layer ran once for a micro-batch."""
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


def compared(workers: Workers, config: DictConfig, number: int, ranks: int, *settings: Any) -> float:
    (whole,) = workers.run(alone, config, number, ranks=1)
    return largest_error(workers.run(staged, config, number, *settings, ranks=ranks), whole)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_gradients_and_loads_are_those_of_one_process(workers: Workers, composed: Compose, schedule: str) -> None:
    config = composed("precision=fp32", "model.n_layers=4", *LOSSES)
    assert compared(workers, config, 6, 2, schedule, ()) < 1e-6


@pytest.mark.parametrize("schedule", [pytest.param("1f1b", marks=pytest.mark.slow), "dualpipev"])
def test_the_same_in_fp8_with_recomputation(workers: Workers, composed: Compose, schedule: str) -> None:
    config = composed("precision=fp8_blockwise", "model.n_layers=4", "memory=ngram", *LOSSES)
    assert compared(workers, config, 4, 2, schedule, PARTS) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [(), PARTS], ids=["kept", "recomputed"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8_blockwise", "fp8_rowwise", "fp8_tensorwise"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_same_in_every_precision(
    workers: Workers, composed: Compose, schedule: str, precision: str, recompute: tuple[str, ...]
) -> None:
    config = composed(f"precision={precision}", "model.n_layers=4", *LOSSES)
    assert compared(workers, config, 6, 2, schedule, recompute) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_same_on_one_rank_and_on_four(workers: Workers, composed: Compose, schedule: str, ranks: int) -> None:
    config = composed("precision=fp32", "model.n_layers=7", *LOSSES)
    assert compared(workers, config, 8, ranks, schedule, ()) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 3, 10])
@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "interleaved_zero_bubble", "zbv"])
def test_the_same_with_few_micro_batches_or_an_odd_number(
    workers: Workers, composed: Compose, schedule: str, number: int
) -> None:
    config = composed("precision=fp32", "model.n_layers=7", *LOSSES)
    assert compared(workers, config, number, 4, schedule, ()) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("swap", ["attention=gqa", "router=softmax", "mtp=none", "mtp.depth=2", "balancing=batch_aux"])
@pytest.mark.parametrize("schedule", ["interleaved_1f1b", "zbv"])
def test_the_same_with_other_parts(workers: Workers, composed: Compose, schedule: str, swap: str) -> None:
    if (schedule, swap) == ("zbv", "mtp.depth=2"):
        pytest.skip("refused")
    config = composed("precision=fp32", "model.n_layers=6", swap, "data.isolate_documents=true")
    assert compared(workers, config, 4, 2, schedule, ()) < 1e-6


STEPS = (4, 6, 4)
"""Micro-batches of each step of a training."""


def trained_alone(config: DictConfig, shards: int) -> dict[str, Tensor]:
    model = build_model(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number in STEPS:
        take_gradients(Losses(model, objective_of(config)), step_of(config, number * shards))
        optimizer.step()
        optimizer.zero_grad()
    return model.state_dict()


def trained(config: DictConfig, schedule: ScheduleName, shards: int) -> tuple[dict[str, Tensor], Tensor | None]:
    """This rank's weights, and MTP's copy of the embedding where it is, on two ranks times `shards`.

    Before each step, a forward pass of other weights, as averaged ones are scored.
    """
    mesh = make_mesh(Sizes(2, shards, 1, 1), "cpu")
    model = build_model(config)
    shares = [Share(model, config, step_of(config, number * shards)) for number in STEPS]
    pipeline = Pipeline(model, group=mesh.stages.get_group(), schedule=schedule)
    if shards > 1:
        shard(model, mesh, pipeline.stages)
    weights = list(model.parameters())
    optimizer = torch.optim.SGD(weights, lr=0.1)
    for share in shares:
        own = share.step.micro_batches[mesh.data_rank :: shards]
        with torch.no_grad():
            torch._foreach_mul_(weights, 2.0)
            pipeline.forward(own[0])
            release(pipeline.stages)
            torch._foreach_mul_(weights, 0.5)
        pipeline.step(own, share.loss, share.balance)
        optimizer.step()
        optimizer.zero_grad()
        pipeline.refresh()
    copy = pipeline.stages[-1].embed_tokens.weight if pipeline.has_loss else None
    return {name: full(weight) for name, weight in model.state_dict().items()}, None if copy is None else full(copy)


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@pytest.mark.parametrize(
    ("schedule", "shards"),
    [
        pytest.param("interleaved_zero_bubble", 1, marks=pytest.mark.slow),
        ("zbv", 1),
        pytest.param("1f1b", 2, marks=pytest.mark.slow),
        pytest.param("zbv", 2, marks=pytest.mark.slow),
    ],
)
def test_weights_after_some_steps_and_their_names(
    workers: Workers, composed: Compose, schedule: str, shards: int
) -> None:
    config = composed("precision=fp32", "model.n_layers=4", *LOSSES)
    (whole,) = workers.run(trained_alone, config, shards, ranks=1)
    results = workers.run(trained, config, schedule, shards, ranks=2 * shards)[::shards]
    names = [name for weights, _ in results for name in weights]
    assert sorted(names) == sorted(whole)
    for weights, copy in results:
        for name, weight in weights.items():
            assert float((weight - whole[name]).abs().max()) <= 1e-6 * float(whole[name].abs().max()), name
        if copy is not None:
            assert torch.equal(copy, results[0][0]["embed_tokens.weight"])


def tensors_alive(config: DictConfig, schedule: ScheduleName) -> list[int]:
    """After each of some steps with a forward pass."""
    model, step = build_model(config), step_of(config, 4)
    share = Share(model, config, step)
    pipeline = Pipeline(model, group=dist.group.WORLD, schedule=schedule)
    alive = []
    for _ in range(4):
        pipeline.step(step.micro_batches, share.loss, share.balance, recompute=PARTS)
        pipeline.forward(step.micro_batches[0])
        gc.collect()
        alive.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
    return alive


@pytest.mark.parametrize("schedule", ["zbv", pytest.param("dualpipev", marks=pytest.mark.slow)])
@pytest.mark.parametrize("precision", ["bf16", pytest.param("fp8_blockwise", marks=pytest.mark.slow)])
def test_a_step_leaves_nothing_behind(workers: Workers, composed: Compose, schedule: str, precision: str) -> None:
    config = composed(f"precision={precision}", "model.n_layers=4")
    for alive in workers.run(tensors_alive, config, schedule, ranks=2):
        assert alive[1:] == alive[1:2] * 3


def passed_alone(config: DictConfig) -> list[Forward]:
    model = build_model(config)
    with torch.no_grad():
        micro_batches = step_of(config, 2).micro_batches
        return [model(micro, with_mtp=mtp) for micro, mtp in zip(micro_batches, (False, True), strict=True)]


def passed(config: DictConfig, schedule: ScheduleName) -> list[tuple[Forward | None, dict[str, Routing]]]:
    """Forward passes, the second one with MTP, before a step and after it."""
    model, step = build_model(config), step_of(config, 4)
    share = Share(model, config, step)
    pipeline = Pipeline(model, group=dist.group.WORLD, schedule=schedule)
    first = pipeline.forward(step.micro_batches[0])
    pipeline.step(step.micro_batches, share.loss, share.balance)
    return [first, pipeline.forward(step.micro_batches[1], with_mtp=True)]


@pytest.mark.parametrize("schedule", ["1f1b", pytest.param("interleaved_1f1b", marks=pytest.mark.slow), "zbv"])
def test_forward_passes_are_those_of_one_process(workers: Workers, composed: Compose, schedule: str) -> None:
    config = composed("precision=bf16", "model.n_layers=4")
    (whole,) = workers.run(passed_alone, config, ranks=1)
    results = workers.run(passed, config, schedule, ranks=2)
    has_loss = 0 if schedule == "zbv" else 1
    assert [i for i, result in enumerate(results) if result[0][0] is not None] == [has_loss]
    for number, expected in enumerate(whole):
        found = results[has_loss][number][0]
        assert torch.equal(found.hidden_BTD, expected.hidden_BTD)
        for one, other in zip(found.predictions, expected.predictions, strict=True):
            assert torch.equal(one.hidden_BSD, other.hidden_BSD)
        routings = {name: routing for result in results for name, routing in result[number][1].items()}
        assert routings.keys() == expected.routings.keys()
        assert all(torch.equal(routing.experts_NK, expected.routings[n].experts_NK) for n, routing in routings.items())


def refused(config: DictConfig, schedule: ScheduleName, chunks: int | None, number: int) -> None:
    model, step = build_model(config), step_of(config, number)
    share = Share(model, config, step)
    pipeline = Pipeline(model, group=dist.group.WORLD, schedule=schedule, chunks=chunks)
    pipeline.step(step.micro_batches, share.loss, share.balance)


@pytest.mark.parametrize(
    ("overrides", "schedule", "chunks", "number", "message"),
    [
        (["model.tie_embeddings=true"], "1f1b", None, 2, "model.tie_embeddings=true"),
        (["model.n_layers=2"], "zbv", None, 4, "model.n_layers=2 and mtp.depth=1: must be at least the 4 stages"),
        (["model.n_layers=2", "mtp=none"], "interleaved_1f1b", 2, 4, "model.n_layers=2: must be at least the 4 stages"),
        (["mtp.depth=3", "model.n_layers=2"], "1f1b", None, 2, "mtp.depth=3: must be at most 2"),
        (["mtp.depth=2", "model.n_layers=6"], "zbv", None, 4, "mtp.depth=2: must be at most 1"),
        ([], "1f1b", None, 1, "at least 2 micro-batches per step on 2 ranks, and there are 1"),
        (["model.n_layers=4"], "dualpipev", None, 3, "at least 4 micro-batches"),
        (["model.n_layers=4"], "interleaved_1f1b", None, 5, "choose data.micro_batch_size"),
        ([], "1f1b", 2, 2, "parallel.chunks=2: must be 1"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(
    workers: Workers,
    composed: Compose,
    overrides: list[str],
    schedule: str,
    chunks: int | None,
    number: int,
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        workers.run(refused, composed(*overrides), schedule, chunks, number, ranks=2)
