"""Speculative decoding by MTP against plain decoding: CPU seconds of one thread, one text, one draft per pass.

With a share a of the drafts kept, c the cost of a pass over two positions and d that of a draft, both in passes over
one position, texts can become (1 + a) / (c + d) times as fast. a and the speed are those of the model that `make train`
makes, after the beginnings of held-out rows; c and d of deeper models are those of random weights.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra import compose, initialize_config_dir

from dsv3.bench.measuring import Figure, interleaved, one_thread
from dsv3.build import build_model
from dsv3.checkpoint.families import Parts
from dsv3.checkpoint.loading import load_run
from dsv3.contracts import Data
from dsv3.evaluation.held_out import held_out_data
from dsv3.inference.backend import DecoderBackend
from dsv3.inference.engines import Source
from dsv3.inference.generation import generate
from dsv3.inference.onnx_backend import OnnxBackend
from dsv3.inference.sampling import Settings
from dsv3.inference.speculation import Speculation
from dsv3.model.decoder import Decoder
from dsv3.model.layers import cached_weight_casts
from dsv3.paths import CONF, ROOT

RUN = ROOT / "runs" / "default" / "seed1"
FINISHED = RUN / "summary.json"
PROMPTS, PROMPT_TOKENS, TOKENS = 64, 64, 64
CONTEXT, CALLS, IDS = 128, 16, 250
LAYERS = (4, 8, 16, 32)
LEAST_SHARE = 0.9
"""Of (1 + a) / (c + d)."""


def speculation(repeats: int, device: torch.device, run: Path = RUN) -> Iterator[Figure]:
    with one_thread():
        loaded = load_run(run, device=device)
        rows, parts = prompts(held_out_data(loaded)), Parts.of(loaded.config)
        with cached_weight_casts(loaded.model):
            kept = {}
            for name, backend in backends(loaded.model, parts):
                source = loaded.model if name == "eager" else backend
                texts = written(source, rows, repeats)
                kept[name], costs = texts.kept, costs_of(backend, repeats)
                yield from of_run(name, texts, costs)
        for layers in LAYERS:
            model, parts = deeper(layers)
            with cached_weight_casts(model):
                for name, backend in backends(model, parts):
                    yield of_depth(name, layers, kept[name], costs_of(backend, repeats), backend)


class Texts(NamedTuple):
    """CPU milliseconds a token."""

    plain: float
    drafted: float
    paying: float  # drafts only while they pay
    kept: float  # a
    same: int  # texts that are equal
    number: int


class Costs(NamedTuple):
    """CPU milliseconds."""

    plain: float  # of a pass over one position
    two: float
    draft: float

    def best(self, kept: float) -> float:
        """(1 + a) / (c + d)."""
        return (1 + kept) * self.plain / (self.two + self.draft)


def of_run(name: str, texts: Texts, costs: Costs) -> Iterator[Figure]:
    gain, best = texts.plain / texts.drafted, costs.best(texts.kept)
    note = (
        f"{texts.drafted:.2f} CPU ms a token against {texts.plain:.2f}; {texts.kept:.0%} of drafts kept, "
        f"{texts.same} of {texts.number} texts the same"
    )
    yield Figure("speculation", f"one MTP draft per pass, {name}, tokens/s", gain, "x", note=note)
    note = f"c {costs.two / costs.plain:.2f}, d {costs.draft / costs.plain:.2f}: {best:.2f}x"
    yield Figure("speculation", f"{name}, of (1 + a) / (c + d)", gain / best, "", LEAST_SHARE, note=note)
    note = f"{texts.paying:.2f} CPU ms a token"
    yield Figure("speculation", f"drafts while they pay, {name}, tokens/s", texts.plain / texts.paying, "x", note=note)


def of_depth(name: str, layers: int, kept: float, costs: Costs, backend: Any) -> Figure:
    counted = backend.draft_costs.gain(kept)
    note = f"c {costs.two / costs.plain:.2f}, d {costs.draft / costs.plain:.2f}; by counting {counted:.2f}x"
    what = f"{layers} layers, {name}, (1 + a) / (c + d)"
    return Figure("speculation", what, costs.best(kept), "x", note=note)


def backends(model: Decoder, parts: Parts) -> Iterator[tuple[str, Any]]:
    yield "eager", DecoderBackend(model)
    yield "onnx", OnnxBackend.of(model, parts, drafts=True)


def deeper(layers: int) -> tuple[Decoder, Parts]:
    """The default model with so many layers and random weights, in FP32."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        chosen = ["model=small", f"model.n_layers={layers}", "precision=fp32", "logger=none"]
        config = compose("train", chosen)
    return build_model(config).eval(), Parts.of(config)


SIDES = {"plain": 0, "drafted": 1, "paying": None}


def written(source: Source, rows: list[list[int]], repeats: int) -> Texts:
    """Greedy text after prompts, from the second token on: with one draft per pass, without, and while they pay."""
    counts, same, seconds = Speculation(), 0, dict.fromkeys(SIDES, 0.0)
    for row in rows:
        texts: dict[str, list[int]] = {}
        spent: dict[str, list[float]] = {side: [] for side in SIDES}
        for _ in range(repeats + 1):
            for side, drafts in SIDES.items():
                settings = Settings(max_tokens=TOKENS, drafts=drafts)
                ids = generate(source, row, settings, speculation=counts if side == "drafted" else None)
                texts[side] = [next(ids)]
                started = time.process_time()
                texts[side] += ids
                spent[side].append(time.process_time() - started)
        seconds = {side: seconds[side] + statistics.median(spent[side][1:]) for side in SIDES}  # the first warms up
        same += texts["plain"] == texts["drafted"] == texts["paying"]
    ms = {side: 1000 * value / len(rows) / (TOKENS - 1) for side, value in seconds.items()}
    return Texts(**ms, kept=counts.acceptance, same=same, number=len(rows))


@torch.inference_mode()
def costs_of(backend: Any, repeats: int) -> Costs:
    """After `CONTEXT` positions of a row, of other tokens each time, or experts would stay in the processor's cache; of
    two rows, one has drafts."""
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(IDS, (CONTEXT,), generator=generator).tolist()
    further = torch.randint(IDS, (CALLS, 2), generator=generator).tolist()
    plain, drafted = range(10**6, 10**6 + 2)  # no row of an engine's
    for row in (plain, drafted):
        backend.add(row, drafts=row == drafted)
        backend.read([row], [text], [0])

    def read(row: int, tokens: int) -> None:
        for pair in further:
            backend.read([row], [pair[:tokens]], [tokens])[0].max(-1)
            backend.rewind(row, CONTEXT)

    def draft() -> None:
        for first, _ in further:
            backend.draft([drafted], [[*text, first]], [1], [lambda logits_V: int(logits_V.max(-1).indices)])

    draft()  # the prompt
    programs: dict[str, Callable[[], object]] = {
        "plain": lambda: read(plain, 1),
        "two": lambda: read(drafted, 2),
        "draft": draft,
    }
    seconds = interleaved(programs, repeats=2 * repeats + 1, clock=time.process_time)
    for row in (plain, drafted):
        backend.drop(row)
    return Costs(*(1000 * seconds[name] / CALLS for name in ("plain", "two", "draft")))


def prompts(data: Data) -> list[list[int]]:
    """The beginnings of held-out rows, evenly over all of them."""
    rows = [row for batch in data.validation_batches() for row in batch.tokens_BT]
    return [row[:PROMPT_TOKENS].tolist() for row in rows[:: max(1, len(rows) // PROMPTS)][:PROMPTS]]
