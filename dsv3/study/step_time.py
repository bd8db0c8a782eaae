"""Seconds of a training step of a config, measured on random tokens: forward, backward and balancing.

On a CPU they are seconds of the processor, which other programs change little.
"""

import statistics
import time

import torch
from omegaconf import DictConfig

from dsv3.build import build_model
from dsv3.config.part import part
from dsv3.contracts import MicroBatch, Step
from dsv3.runtime import device_named
from dsv3.training.step import Losses, balance, take_gradients

REPEATS = 5


def step_seconds(config: DictConfig) -> float:
    """Median over a few micro-batches, after one that warms up; the optimiser's step is not part of it."""
    device = device_named(config.trainer.accelerator, key="trainer.accelerator")
    model = build_model(config).to(device).train()
    vocabulary = config.model.vocab_size
    objective = part(config.objective)(token_bytes_V=torch.ones(vocabulary, dtype=torch.int64)).to(device)
    losses = Losses(model, objective)
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    seconds = []
    for number in range(1 + REPEATS):
        micro = random_tokens(config.data.micro_batch_size, config.data.sequence_length, vocabulary, seed=number)
        micro = micro.map(lambda tensor: tensor.to(device))
        started = clock()
        sums = take_gradients(losses, Step([micro], 0, {}), recompute=config.recompute)
        balance(model, sums.loads, 0)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - started)
        model.zero_grad()
    return statistics.median(seconds[1:])


def random_tokens(rows: int, length: int, vocabulary: int, *, seed: int) -> MicroBatch:
    """One document a row, of one domain."""
    row = torch.randint(0, vocabulary, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    ones = torch.ones(rows, length, dtype=torch.int64)
    return MicroBatch(row[:, :-1], row[:, 1:], torch.arange(length).expand(rows, -1), ones, ones - 1)
