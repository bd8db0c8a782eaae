"""Ranks that are only imagined: a model on the meta device is divided as each of them would divide its own.

The process group has the size of the run and sends nothing. Layers of equal shapes are sharded once and counted as
often as they are there.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from dsv3.contracts import OptimizerFactory
from dsv3.distributed.mesh import make_mesh
from dsv3.distributed.parallel import ScheduleName, Sizes
from dsv3.distributed.pipeline import Pipeline
from dsv3.distributed.rank_bytes import FP32, Held, held_by
from dsv3.distributed.shard import shard
from dsv3.distributed.stage import Stage
from dsv3.model.decoder import Absent, Decoder
from dsv3.model.parameters import is_table


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
    known: dict[object, list[RankLayout]] = {}
    found: list[RankLayout] = []
    for stage in range(sizes.stages):
        first, last = stage * sizes.data, (stage + 1) * sizes.data - 1
        with one_of(sizes.world, first):
            divided = Divided(build, sizes, schedule)
            alike = divided.signature()
            ranks = known.get(alike) or [divided.layout(optimizer, averaged)]
        if alike not in known and last > first:
            with one_of(sizes.world, last):
                ranks.append(Divided(build, sizes, schedule).layout(optimizer, averaged))
        known[alike] = ranks
        found += [one._replace(rank=rank, stage=stage) for one, rank in zip(ranks, (first, last))]
    return found


@contextmanager
def one_of(ranks: int, rank: int) -> Iterator[None]:
    """This process as one of so many ranks, of which the others do not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    try:
        yield
    finally:
        dist.destroy_process_group()


class Divided:
    """The model of this rank, before its weights are sharded. Layers of equal shapes are there once."""

    def __init__(self, build: Callable[[], Decoder], sizes: Sizes, schedule: ScheduleName | None) -> None:
        self.mesh = make_mesh(sizes, "cpu")
        self.stages: list[Stage] = []
        with torch.device("meta"):
            self.model = build()
            if sizes.stages > 1:
                assert schedule is not None, "Parallel.sizes refuses it"
                self.stages = Pipeline(self.model, group=self.mesh.stages.get_group(), schedule=schedule).stages
        self.times = self._thin_out()

    @property
    def copies(self) -> list[nn.Parameter]:
        """Weights of another stage, which no optimiser steps here."""
        embeddings = [stage.embed_tokens for stage in self.stages if stage.has_copy]
        return [parameter for embedding in embeddings for parameter in embedding.parameters()]

    def _thin_out(self) -> dict[str, int]:
        """Leave out layers with the shapes of an earlier one; how often each parameter that is left stands."""
        first: dict[object, int] = {}
        layers: Counter[int] = Counter()
        for i, layer in enumerate(self.model.layers):
            kept = first.setdefault(tuple((name, p.shape) for name, p in layer.named_parameters()), i)
            layers[kept] += 1
            if kept != i:
                for decoder in (self.model, *self.stages):
                    decoder.layers[i] = Absent()
        of_layer = {f"layers.{i}": count for i, count in layers.items()}
        names = [name for name, _ in self.model.named_parameters()]
        return {name: of_layer.get(".".join(name.split(".")[:2]), 1) for name in names}

    def signature(self) -> object:
        """Equal for two stages that hold the same."""
        shapes = [
            (".".join(word for word in name.split(".") if not word.isdecimal()), parameter.shape, self.times[name])
            for name, parameter in self.model.named_parameters()
        ]
        return tuple(sorted(shapes)), tuple(copy.shape for copy in self.copies)

    def layout(self, optimizer: OptimizerFactory, averaged: bool) -> RankLayout:
        sizes = self.mesh.sizes
        whole = sum(copy.numel() for copy in self.copies)
        for name, parameter in self.model.named_parameters():
            if not is_table(self.model, parameter):  # and of a rank's own experts alone
                whole += self.times[name] * parameter.numel() // (sizes.experts if ".experts." in name else 1)
        if sizes.world > 1:
            shard(self.model, self.mesh, self.stages)
        held = held_by(self.model, optimizer, averaged=averaged, copies=self.copies, times=self.times)
        return RankLayout(dist.get_rank(), self.mesh.stage, held, FP32 * whole)
