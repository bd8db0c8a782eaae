"""The data pipeline against what training consumes."""

from collections.abc import Iterator

from dsv3.bench.measuring import Figure, interleaved
from dsv3.bench.models import LENGTH, ROWS, configured, ours
from dsv3.bench.training import our_step
from dsv3.build import build_data

STEPS = 50


def data(repeats: int) -> Iterator[Figure]:
    """Tokens per second that the datamodule gives, packing and fill-in-the-middle included, and that training takes."""
    config, model = ours("mtp=none")
    steps = iter(build_data(configured()).train_dataloader())

    def pipeline() -> None:
        for _ in range(STEPS):
            next(steps)

    training = our_step(model, config.model.vocab_size)
    seconds = interleaved({"pipeline": pipeline, "training": training}, repeats=repeats)
    tokens = ROWS * LENGTH
    rates = {"pipeline": STEPS * tokens / seconds["pipeline"], "training": tokens / seconds["training"]}
    note = f"{rates['pipeline']:,.0f} tokens/s against {rates['training']:,.0f}"
    ratio = rates["pipeline"] / rates["training"]
    yield Figure("data", "data pipeline against training, bf16", ratio, "x", 50.0, note=note)
