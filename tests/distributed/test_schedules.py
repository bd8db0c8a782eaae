"""Cuts of a model into stages, and idle time of ranks in each schedule: what the plan says."""

from collections import Counter
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from omegaconf import DictConfig
from torch import nn

from dsv3.distributed.pipeline import KINDS, ScheduleName
from dsv3.distributed.stage import Stage, layers_of_stages
from dsv3.planning.bubbles import pipeline_costs
from dsv3.planning.recipe import ChunkTimes, PipelineSchedule
from dsv3.planning.skeleton import read_skeleton
from dsv3.planning.stages import parts_of_pipeline
from tests.planning.models import on_meta, skeleton

Compose = Callable[..., DictConfig]
Action = tuple[str, int, int]
"""Kind, stage and micro-batch."""

PLANNED_AS: dict[ScheduleName, PipelineSchedule] = {
    "1f1b": "1f1b",
    "interleaved_1f1b": "1f1b",
    "interleaved_zero_bubble": "zb1p",
    "zbv": "zb1p",
    "dualpipev": "dualpipe",
}
DURATIONS = {"F": 1.0, "I": 1.0, "W": 1.0, "B": 2.0}
"""Of a chunk's forward pass, the two parts of its backward pass, and the whole of that."""


@pytest.mark.parametrize(("overrides", "stages"), [([], 2), ([], 4), (["model.n_layers=7"], 3), (["mtp=none"], 3)])
def test_layers_are_cut_as_the_plan_cuts_them(composed: Compose, overrides: list[str], stages: int) -> None:
    config = composed(*overrides)
    of_config = read_skeleton(config)
    cut = layers_of_stages(config.model.n_layers, of_config.mtp.depth, stages)
    planned = parts_of_pipeline(of_config, pp=stages, pipeline="1f1b")
    for layers, part in zip(cut, planned, strict=True):
        assert len(layers) + part.mtp_modules == part.dense_blocks + part.moe_blocks
    assert [layer for layers in cut for layer in layers] == list(range(config.model.n_layers))


@pytest.mark.parametrize("stages", [16, 32])
def test_parameters_of_the_stages_of_v3_671b_are_the_plans(stages: int) -> None:
    """MTP's copy of the embedding included."""
    whole, planned = on_meta("model=v3_671b"), skeleton("model=v3_671b")
    cut = layers_of_stages(len(whole.layers), whole.mtp.depth, stages)
    counts = [
        sum(parameter.numel() for parameter in Stage(whole, number=number, cut=cut).parameters())
        for number in range(stages)
    ]
    assert counts == [sum(part.weights) for part in parts_of_pipeline(planned, pp=stages, pipeline="1f1b")]


def actions(order: Sequence[Any]) -> list[list[Action]]:
    """What a rank computes, in order. Actions that may overlap are together: torch runs one after the other and sends
    what they give once both are done.

    Micro-batches are counted: torch runs the first of 1F1B on the last rank too, where its list begins with the second.
    """
    counts: Counter[tuple[str, int]] = Counter()
    found = []
    for together in [action.sub_actions or (action,) for action in order if action is not None]:
        kinds = [(action.computation_type.value, action.stage_index) for action in together]
        found.append([numbered(kind, stage, counts) for kind, stage in kinds if kind in DURATIONS])
    return [together for together in found if together]


def numbered(kind: str, stage: int, counts: Counter[tuple[str, int]]) -> Action:
    counts["I" if kind == "B" else kind, stage] += 1
    return kind, stage, counts["I" if kind == "B" else kind, stage] - 1


def needed(action: Action, last_stage: int) -> list[Action]:
    """What an action reads of another stage."""
    kind, stage, micro = action
    if kind == "F":
        return [("F", stage - 1, micro)] if stage else []
    return [("I", stage + 1, micro)] if kind in "IB" and stage < last_stage else []


def duration(orders: Sequence[list[list[Action]]], last_stage: int) -> float:
    """Of a step: an action begins when those before it on its rank are done, and what it reads is there."""
    queues, clock = [list(order) for order in orders], [0.0 for _ in orders]
    done: dict[Action, float] = {}
    while left := sum(map(len, queues)):
        for rank, queue in enumerate(queues):
            while queue and all(other in done for action in queue[0] for other in needed(action, last_stage)):
                together = queue.pop(0)
                for action in together:
                    start = max([clock[rank], *(done[other] for other in needed(action, last_stage))])
                    clock[rank] = start + DURATIONS[action[0]]
                for kind, stage, micro in together:
                    done["I" if kind == "B" else kind, stage, micro] = clock[rank]
        assert sum(map(len, queues)) < left, "ranks wait for each other"
    return max(clock)


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("schedule", get_args(ScheduleName))
def test_idle_time_of_the_schedules_is_the_plans(schedule: ScheduleName, ranks: int) -> None:
    """In units of a chunk's forward pass. The plan's DualPipe has as many ranks as stages, each with two of them."""
    kind = KINDS[schedule]
    stages, number = ranks * kind.chunks, 2 * ranks * kind.chunks
    stage = SimpleNamespace(group_size=ranks, group_rank=0, num_stages=stages, stage_index=0, submod=nn.Identity())
    made = kind.make(stage if schedule == "1f1b" else [stage] * kind.chunks, number)
    orders = [actions(order) for order in made.pipeline_order.values()]
    busy = {sum(DURATIONS[kind] for together in order for kind, _, _ in together) for order in orders}
    times = ChunkTimes(forward=1.0, backward=2.0, weight=1.0, overlapped=3.0)
    pp = stages if schedule == "dualpipev" else ranks
    planned = pipeline_costs(PLANNED_AS[schedule], pp=pp, num_microbatches=number, times=times)
    assert {duration(orders, stages - 1) - time for time in busy} == {planned.bubble}
