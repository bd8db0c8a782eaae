"""Speculative decoding of the model that `make train` makes, against plain decoding of the same prompts."""

from collections.abc import Iterator
from pathlib import Path

import torch

from dsv3.bench.measuring import Figure, interleaved
from dsv3.checkpoint.loading import load_run
from dsv3.contracts import Data
from dsv3.evaluation.held_out import held_out_data
from dsv3.inference.generation import generate
from dsv3.inference.sampling import Settings
from dsv3.inference.speculation import Speculation
from dsv3.model.layers import cached_weight_casts
from dsv3.paths import ROOT

RUN = ROOT / "runs" / "default" / "seed1"
FINISHED = RUN / "summary.json"
PROMPTS, PROMPT_TOKENS, TOKENS, DRAFTS = 64, 64, 64, 2


def speculation(repeats: int, device: torch.device, run: Path = RUN) -> Iterator[Figure]:
    """Greedy text after the beginnings of held-out rows of all domains; prompts and the first token included."""
    loaded = load_run(run, device=device)
    counts, seconds, same = Speculation(), {"plain": 0.0, "drafted": 0.0}, 0
    rows = prompts(held_out_data(loaded))
    with cached_weight_casts(loaded.model):
        for row in rows:
            texts: dict[str, list[int]] = {}

            def write(side: str, row: list[int] = row, texts: dict[str, list[int]] = texts) -> None:
                settings = Settings(max_tokens=TOKENS, drafts=DRAFTS if side == "drafted" else 0)
                texts[side] = list(generate(loaded.model, row, settings, speculation=counts))

            turns = interleaved({"plain": lambda: write("plain"), "drafted": lambda: write("drafted")}, repeats=repeats)
            seconds = {side: seconds[side] + turns[side] for side in seconds}
            same += texts["plain"] == texts["drafted"]
    ms = {side: 1000 * value / len(rows) / TOKENS for side, value in seconds.items()}
    note = (
        f"{ms['drafted']:.2f} ms a token against {ms['plain']:.2f}; {counts.acceptance:.0%} of drafts kept, "
        f"{same} of {len(rows)} texts the same"
    )
    yield Figure("speculation", "MTP drafts, tokens/s", seconds["plain"] / seconds["drafted"], "x", 1.2, note=note)


def prompts(data: Data) -> list[list[int]]:
    """The beginnings of held-out rows, evenly over all of them."""
    rows = [row for batch in data.validation_batches() for row in batch.tokens_BT]
    return [row[:PROMPT_TOKENS].tolist() for row in rows[:: max(1, len(rows) // PROMPTS)][:PROMPTS]]
