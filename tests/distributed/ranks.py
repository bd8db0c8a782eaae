"""Runs of these tests, over ranks and in one process."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor

from dsv3.checkpoint.run_folder import load_checkpoint
from dsv3.training.fit import fit
from dsv3.training.run import Run


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


def fitted(config: DictConfig, act: Callable[[DictConfig], Run] = fit) -> Run:
    """Train by `fit`, as train.py does; or do something else with a run's configuration."""
    if dist.is_initialized():
        rank, ranks = str(dist.get_rank()), str(dist.get_world_size())
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "TORCHELASTIC_RUN_ID": "test"}
    try:
        return act(config)
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
