"""What ranks run in these tests, and the same in one process."""

import os
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor

from dsv3.build import build_model
from dsv3.checkpoint.run_folder import load_checkpoint
from dsv3.config.part import part
from dsv3.contracts import MicroBatch, Step
from dsv3.distributed.mesh import make_mesh
from dsv3.distributed.parallel import Sizes
from dsv3.distributed.shard import shard, whole
from dsv3.training.fit import fit
from dsv3.training.run import Run
from dsv3.training.step import Losses, gradients, norm_of, take_gradients


class Taken(NamedTuple):
    """One step's results over all ranks."""

    gradients: dict[str, Tensor]
    nll: float
    norm: float
    counts: Tensor


def random_batches(config: DictConfig, count: int, *, rows: int = 2, length: int = 32) -> list[MicroBatch]:
    """Micro-batches of random tokens, the last row of the last one half padding."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for number in range(count):
        ids = torch.randint(9, config.model.vocab_size, (rows, length + 1), generator=generator)
        documents = torch.ones(rows, length, dtype=torch.int64)
        targets = ids[:, 1:].contiguous()
        if number == count - 1:
            documents[-1, length // 2 :] = 0
            targets[-1, length // 2 - 1 :] = -100
        positions = torch.arange(length).expand(rows, length).contiguous()
        found.append(MicroBatch(ids[:, :-1].contiguous(), targets, positions, documents, torch.zeros_like(documents)))
    return found


def take_step(config: DictConfig, sizes: Sizes | None, micro: list[MicroBatch]) -> Taken:
    """Gradients of one step, in one process (`sizes` None) or over the ranks of this process group."""
    model = build_model(config)
    own, filled = micro, 0
    if sizes is not None:
        mesh = make_mesh(sizes, "cpu")
        shard(model, mesh)
        each = -(-len(micro) // sizes.data)
        padding = MicroBatch(*(torch.zeros_like(tensor) for tensor in micro[0]))._replace(
            targets_BT=torch.full_like(micro[0].targets_BT, -100)
        )
        numbers = range(mesh.data_rank, each * sizes.data, sizes.data)
        own = [micro[i] if i < len(micro) else padding for i in numbers]
        filled = sum(i >= len(micro) for i in numbers)
    objective = part(config.objective)(token_bytes_V=torch.ones(config.model.vocab_size, dtype=torch.int64))
    sums = take_gradients(Losses(model, objective), Step(own, 0, {}, filled), recompute=config.recompute)
    sums.add({"squares": norm_of(gradients(model).counted).double().square()})
    total = sums.over_ranks()
    found = {name: whole(p.grad).to_dense() for name, p in model.named_parameters() if p.grad is not None}
    return Taken(found, total.scalars["nll"].item(), total.scalars["squares"].sqrt().item(), total.loads.counts)


class Trained(NamedTuple):
    """What a run wrote."""

    losses: np.ndarray
    bpb: np.ndarray
    routing: np.ndarray
    loads: list[list[int]]
    biases: list[list[float]]
    weights: dict[str, Tensor]
    averaged: dict[str, Tensor]
    state: dict[str, Any]


def fitted(config: DictConfig) -> Run:
    """Train by `fit`, as train.py does."""
    if dist.is_initialized():
        rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "test"}
    try:
        return fit(config)
    finally:
        for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RUN_ID"):
            os.environ.pop(name, None)


def train(config: DictConfig) -> Trained | None:
    """Train; rank 0 returns what was written."""
    run = fitted(config)
    if not run.folder.writes:
        return None
    run.folder.release()
    train, experts = run.folder.read("metrics/train"), run.folder.read("metrics/experts")
    routing = run.folder.read("metrics/routing")
    checkpoint = load_checkpoint(run.folder.checkpoints()[-1])
    return Trained(
        losses=train.loss.to_numpy(),
        bpb=run.folder.read("metrics/validation").bpb.to_numpy(),
        routing=routing.select_dtypes("number").to_numpy(),
        loads=[list(load) for load in experts.load],
        biases=[list(bias) for bias in experts.bias],
        weights=checkpoint["state_dict"],
        averaged=checkpoint["callbacks"]["EMA"]["weights"],
        state=checkpoint,
    )
