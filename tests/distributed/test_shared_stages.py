"""Pipeline stages whose weights, or experts, lie on several ranks give the gradients of one process."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from omegaconf import DictConfig

from dsv3.build import build_model
from dsv3.contracts import MicroBatch
from dsv3.distributed.agree import sum_over_ranks
from dsv3.distributed.mesh import make_mesh
from dsv3.distributed.parallel import Sizes
from dsv3.distributed.pipeline import Pipeline, ScheduleName
from dsv3.distributed.shard import shard, whole
from dsv3.training.step import Losses, take_gradients
from tests.distributed.test_pipeline import (
    LOSSES,
    PARTS,
    SCHEDULES,
    Outcome,
    Share,
    gradients_of,
    largest_error,
    loads_of,
    objective_of,
    router_calls,
    step_of,
)
from tests.distributed.workers import Workers

Compose = Callable[..., DictConfig]
SIZES = {"fsdp": Sizes(2, 2, 1, 1), "ep": Sizes(2, 1, 1, 2)}
NUMBER = 8  # of micro-batches


def joined(micro_batches: list[MicroBatch]) -> MicroBatch:
    """All of their rows in one."""
    return MicroBatch(*(torch.cat(parts) for parts in zip(*(micro.packed for micro in micro_batches), strict=True)))


def alone(config: DictConfig, together: int) -> Outcome:
    """`together`: ranks that share experts, which see the tokens of as many micro-batches at once. In FP8 their
    gradients depend on it: tokens share scales."""
    model, step = build_model(config), step_of(config, NUMBER)
    calls = router_calls(model)
    sums = take_gradients(Losses(model, objective_of(config)), step)
    found = Outcome(gradients_of(model), sums.loads.by_layer(), calls)
    if together > 1:
        model = build_model(config)
        parts = [joined(step.micro_batches[i : i + together]) for i in range(0, NUMBER, together)]
        take_gradients(Losses(model, objective_of(config)), step._replace(micro_batches=parts))
        found.gradients.update({name: grad for name, grad in gradients_of(model).items() if ".experts." in name})
    return found


def shared(config: DictConfig, sizes: Sizes, schedule: ScheduleName, recompute: tuple[str, ...]) -> Outcome:
    """Of this rank's stages."""
    mesh = make_mesh(sizes, "cpu")
    model, step = build_model(config), step_of(config, NUMBER)
    share = Share(model, config, step)
    pipeline = Pipeline(model, group=mesh.stages.get_group(), schedule=schedule)
    shard(model, mesh, pipeline.stages)
    calls = router_calls(model)
    own = step.micro_batches[mesh.data_rank :: sizes.data]
    routings = pipeline.step(own, share.loss, share.balance, recompute=recompute)
    loads = loads_of(model, own, routings)
    sum_over_ranks(loads.counts, mesh.data.get_group())
    return Outcome({name: whole(grad) for name, grad in gradients_of(model).items()}, loads.by_layer(), calls)


QUICK = ("1f1b", "ep", "fp8_blockwise", ())
CASES = list(product(SCHEDULES, SIZES, ("fp32", "fp8_blockwise"), ((), PARTS)))


@pytest.mark.parametrize(
    ("schedule", "spread", "precision", "recompute"),
    [pytest.param(*case, marks=() if case == QUICK else pytest.mark.slow) for case in CASES],
    ids=lambda value: value if isinstance(value, str) else "recomputed" if value else "kept",
)
def test_gradients_are_those_of_one_process(
    workers: Workers, composed: Compose, schedule: str, spread: str, precision: str, recompute: tuple[str, ...]
) -> None:
    config = composed(f"precision={precision}", "dispatch=all_to_all", "model.n_layers=4", *LOSSES)
    sizes = SIZES[spread]
    (one,) = workers.run(alone, config, sizes.experts, ranks=1)
    parts = workers.run(shared, config, sizes, schedule, recompute, ranks=4)
    both = [a._replace(calls=a.calls + b.calls) for a, b in (parts[:2], parts[2:])]
    assert largest_error(both, one) < 1e-6
