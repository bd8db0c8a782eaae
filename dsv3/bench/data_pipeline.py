"""Throughput of the data pipeline against training's consumption."""

from collections.abc import Iterator

import torch

from dsv3.bench.compared import STANDARD, configured, ours
from dsv3.bench.measuring import Figure, interleaved
from dsv3.bench.training_step import our_step
from dsv3.build import build_data

STEPS = 2048


def data(repeats: int, device: torch.device) -> Iterator[Figure]:
    """Tokens per second that the datamodule gives from its start, and that training takes."""
    config, model = ours(STANDARD, "mtp=none", device=device)
    training = our_step(STANDARD, model, config)
    tokens = STANDARD.tokens
    loader = build_data(configured(STANDARD, f"run.tokens={STEPS * tokens}")).train_dataloader()

    def pipeline() -> None:
        for _ in loader:
            pass

    seconds = interleaved({"pipeline": pipeline, "training": training}, repeats=repeats)
    rates = {"pipeline": STEPS * tokens / seconds["pipeline"], "training": tokens / seconds["training"]}
    note = f"{rates['pipeline']:,.0f} tokens/s against {rates['training']:,.0f}"
    ratio = rates["pipeline"] / rates["training"]
    yield Figure("data", "data pipeline against training, bf16", ratio, "x", 50.0, note=note)
