"""Ranks that are only imagined: a model on the meta device is divided as each of them would divide its own.

The process group has the size of the run and sends nothing. Layers of equal shapes are sharded once and counted as often
as they are there.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from dsv3.contracts import OptimizerFactory
from dsv3.distributed.layout import FP32, Held, held_by
from dsv3.distributed.mesh import make_mesh
from dsv3.distributed.parallel import ScheduleName, Sizes
from dsv3.distributed.pipeline import Pipeline
from dsv3.distributed.shard import is_table, shard
from dsv3.distributed.stage import Stage
from dsv3.model.decoder import Absent, Decoder


class RankLayout(NamedTuple):
    """A rank, and what it holds."""

    rank: int
    stage: int
    held: Held
    whole_gradients: int  # bytes, where several micro-batches are added up


def layouts(
    build: Callable[[], Decoder],
    sizes: Sizes,
    schedule: ScheduleName | None,
    optimizer: OptimizerFactory,
    *,
    averaged: bool,
) -> list[RankLayout]:
    """Of the first and the last rank of every stage, which hold the most and the least of it.

    build: gives the whole model. averaged: whether the run averages weights.

    Raises:
        ValueError: the model cannot be divided so.
    """
    found: list[RankLayout] = []
    known: dict[object, RankLayout] = {}
    for stage in range(sizes.stages):
        for number in sorted({0, sizes.data - 1}):
            rank = stage * sizes.data + number
            with one_of(sizes.world, rank):
                mesh = make_mesh(sizes, "cpu")
                with torch.device("meta"):
                    model = build()
                    stages = cut(model, mesh.stages.get_group(), schedule) if sizes.stages > 1 else []
                times = thin_out(model, stages)
                key = number, signature(model, stages, times)
                if key not in known:
                    whole = sum(times[name] * bytes_of_whole(model, name, sizes) for name in times)
                    if sizes.world > 1:
                        shard(model, mesh, stages)
                    copies = copies_in(stages)
                    held = held_by(model, optimizer, averaged=averaged, copies=copies, times=times)
                    known[key] = RankLayout(rank, stage, held, whole + FP32 * sum(copy.numel() for copy in copies))
            found.append(known[key]._replace(rank=rank, stage=stage))
    return found


@contextmanager
def one_of(ranks: int, rank: int) -> Iterator[None]:
    """This process as one of so many ranks, of which the others do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


def cut(model: Decoder, group: dist.ProcessGroup, schedule: ScheduleName | None) -> list[Stage]:
    """The stages of `model` on this rank; the model is left without its other parts."""
    assert schedule is not None  # dsv3.distributed.parallel refuses stages without one
    return Pipeline(model, group=group, schedule=schedule).stages


def thin_out(model: Decoder, stages: list[Stage]) -> dict[str, int]:
    """Leave out all but one of the layers with equal shapes, in place; how often each parameter left is there."""
    first: dict[object, int] = {}
    layers: Counter[int] = Counter()
    for i, layer in enumerate(model.layers):
        key = tuple((name, parameter.shape) for name, parameter in layer.named_parameters())
        kept = first.setdefault(key, i)
        layers[kept] += 1
        if kept != i:
            for decoder in (model, *stages):
                decoder.layers[i] = Absent()
    times = {name: 1 for name, _ in model.named_parameters()}
    for i, count in layers.items():
        times |= {f"layers.{i}.{name}": count for name, _ in model.layers[i].named_parameters()}
    return times


def signature(model: Decoder, stages: list[Stage], times: dict[str, int]) -> object:
    """What two stages have in common that hold the same."""
    shapes = [
        (".".join(part for part in name.split(".") if not part.isdecimal()), parameter.shape, times[name])
        for name, parameter in model.named_parameters()
    ]
    return tuple(sorted(shapes)), tuple(copy.shape for copy in copies_in(stages))


def copies_in(stages: list[Stage]) -> list[torch.nn.Parameter]:
    """Weights of another stage, of which a stage has a copy that no optimiser steps."""
    return [parameter for stage in stages if stage.has_copy for parameter in stage.embed_tokens.parameters()]


def bytes_of_whole(model: Decoder, name: str, sizes: Sizes) -> int:
    """A parameter's gradient before it is sharded: of a rank's own experts alone, and none of a table."""
    parameter = model.get_parameter(name)
    if is_table(model, parameter):
        return 0
    return FP32 * parameter.numel() // (sizes.experts if ".experts." in name else 1)
