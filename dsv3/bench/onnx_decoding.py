"""The ONNX graph against eager decoding: CPU milliseconds of one thread, and whether they write the same.

The default model with random weights, in FP32 on both sides; what INT8 loses is measured on the run of `make train`.
"""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import Tensor

from dsv3.bench.drafts import RUN, prompts
from dsv3.bench.measuring import Figure, interleaved, one_thread
from dsv3.build import build_model
from dsv3.checkpoint.families import Parts
from dsv3.checkpoint.loading import Loaded, load_run
from dsv3.checkpoint.onnx.exported import export_onnx
from dsv3.contracts import Turn
from dsv3.evaluation.held_out import held_out_data
from dsv3.inference.backend import DecoderBackend
from dsv3.inference.engine import complete
from dsv3.inference.onnx_backend import OnnxBackend
from dsv3.inference.sampling import Settings
from dsv3.model.decoder import Decoder
from dsv3.model.layers import cached_weight_casts
from dsv3.paths import CONF
from dsv3.rollout.sampler import sample

SIZES = ((1, 128, 4.5), (1, 4064, 2.8), (8, 128, 2.6), (32, 128, 1.9), (8, 4064, 1.4))
"""Rows, positions held, and how much faster the graph should be."""
TEXTS, TEXT_TOKENS = 50, 64
ROLLOUTS, PROMPT_TOKENS, ROLLOUT_TOKENS, ROLLOUT_GOAL = 32, 64, 128, 2.2
INT8_SIZES = ((128, 8.0), (4064, 3.5))
"""Positions held by the one row, and the goal."""
INT8_ROWS, MOST_KL, LEAST_AGREEMENT = 64, 0.002, 0.97
VOCABULARY = 4096


def onnx_decoding(repeats: int, device: torch.device) -> Iterator[Figure]:
    """One thread, whatever the process had; CPU seconds, so that other processes matter little."""
    with one_thread():
        with initialize_config_dir(str(CONF), version_base="1.3"):
            config = compose(
                "train", ["model=small", f"tokenizer.vocab_size={VOCABULARY}", "precision=fp32", "logger=none"]
            )
        model = build_model(config).eval()
        with cached_weight_casts(model), torch.inference_mode():
            for rows, context, goal in SIZES:
                yield speed(config, model, rows, context, goal, repeats)
            yield rollouts(config, model, repeats)
            yield same_ids(config, model)
            yield new_weights(config, model, repeats)
            if RUN.exists():
                yield from quantised(load_run(RUN), model, repeats)


def cpu_ms(programs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    seconds = interleaved(programs, repeats=repeats, clock=time.process_time)
    return {name: 1000 * value for name, value in seconds.items()}


def speed(config: DictConfig, model: Decoder, rows: int, context: int, goal: float, repeats: int) -> Figure:
    """One token for each row after `context` positions."""
    calls = max(2, 32 // rows)
    backends = {"eager": DecoderBackend(model), "onnx": graph_of(config, model)}
    programs = {name: decoding(backend, rows, context, calls) for name, backend in backends.items()}
    ms = cpu_ms(programs, repeats)
    note = f"{ms['eager'] / calls:.2f} CPU ms a call against {ms['onnx'] / calls:.2f}"
    what = f"FP32, {rows} row{'s' * (rows > 1)} at {context}, eager over onnx"
    return Figure("onnx", what, ms["eager"] / ms["onnx"], "x", goal, note=note)


def graph_of(config: DictConfig, model: Decoder) -> OnnxBackend:
    return OnnxBackend.of(model, Parts.of(config), drafts=False)


def decoding(backend: Any, rows: int, context: int, calls: int) -> Callable[[], None]:
    """Reads a token of every row, `calls` times, after as many positions each time."""
    generator = torch.Generator().manual_seed(0)
    names = list(range(rows))
    texts = torch.randint(0, VOCABULARY, (rows, context), generator=generator).tolist()
    for row, text in zip(names, texts, strict=True):
        backend.add(row, drafts=False)
        for start in range(0, context, 254):
            backend.read([row], [text[start : start + 254]], [0])
    tokens = torch.randint(0, VOCABULARY, (calls, rows, 1), generator=generator).tolist()

    def program() -> None:
        for column in tokens:
            torch.stack(backend.read(names, column, [1] * rows)).max(-1)
            for row in names:
                backend.rewind(row, context)

    return program


def rollouts(config: DictConfig, model: Decoder, repeats: int) -> Figure:
    """Sampled continuations, prompts and a new graph included."""
    generator = torch.Generator().manual_seed(1)
    asked = torch.randint(0, VOCABULARY, (ROLLOUTS, PROMPT_TOKENS), generator=generator).tolist()

    def drawn(source: Any) -> list[Turn]:
        seeds = list(range(ROLLOUTS))
        tokenizer: Any = NoText()
        return sample(source, tokenizer, asked, seeds, max_tokens=ROLLOUT_TOKENS, temperature=1.0)

    programs: dict[str, Callable[[], object]] = {
        "eager": lambda: drawn(model),
        "onnx": lambda: drawn(graph_of(config, model)),
    }
    ms = cpu_ms(programs, max(1, repeats // 2))
    note = f"{ms['eager'] / 1000:.2f} CPU s against {ms['onnx'] / 1000:.2f}"
    what = f"rollout of {ROLLOUTS} rows, {PROMPT_TOKENS} + {ROLLOUT_TOKENS} tokens, eager over onnx"
    return Figure("onnx", what, ms["eager"] / ms["onnx"], "x", ROLLOUT_GOAL, note=note)


class NoText:
    """A tokenizer without words: the texts of rollouts are not looked at."""

    eos = -1

    def decode(self, ids: Any) -> str:
        return ""


def same_ids(config: DictConfig, model: Decoder) -> Figure:
    """Greedy text of both after prompts of unequal length, eight rows at a time."""
    generator = torch.Generator().manual_seed(2)
    asked = [torch.randint(0, VOCABULARY, (1 + 4 * i,), generator=generator).tolist() for i in range(TEXTS)]
    settings = [Settings(max_tokens=TEXT_TOKENS)] * TEXTS
    eager, onnx = (
        complete(backend, asked, settings, decode=str, at_once=8)
        for backend in (DecoderBackend(model), graph_of(config, model))
    )
    same = sum(a.ids == b.ids for a, b in zip(eager, onnx, strict=True))
    return Figure("onnx", f"equal greedy texts of {TEXT_TOKENS} tokens, of {TEXTS}", same, "", TEXTS)


def new_weights(config: DictConfig, model: Decoder, repeats: int) -> Figure:
    seconds = cpu_ms({"new": lambda: graph_of(config, model)}, repeats)["new"] / 1000
    return Figure("onnx", "a graph of new weights, CPU s", seconds, "s", 0.1, at_most=True)


def quantised(loaded: Loaded, eager: Decoder, repeats: int) -> Iterator[Figure]:
    """What INT8 loses, teacher-forced on held-out rows, over all positions; and its speed against `eager`, a model in
    FP32 of the same sizes."""
    parts, rows = Parts.of(loaded.config), prompts(held_out_data(loaded))[:INT8_ROWS]
    with tempfile.TemporaryDirectory() as folder:
        started = time.process_time()
        export_onnx(loaded, Path(folder, "none"), mtp=True, quantise="none", weights="live")
        took = time.process_time() - started
        yield Figure("onnx", "export of the default run, CPU s", took, "s", 2.0, at_most=True)
        export_onnx(loaded, Path(folder, "int8"), mtp=False, quantise="int8", weights="live")
        int8 = OnnxBackend.opened(Path(folder, "int8"), drafts=False)
        exact = OnnxBackend.of(loaded.model, parts, drafts=False)
        logits = [(scored(exact, row), scored(int8, row)) for row in rows]
    p, q = (torch.cat(side).log_softmax(-1) for side in zip(*logits, strict=True))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    agree = float((p.max(-1).indices == q.max(-1).indices).float().mean())
    note = f"{len(p):,} positions"
    yield Figure("onnx", "INT8: mean KL to FP32, trained run", kl, "", MOST_KL, at_most=True, note=note)
    yield Figure("onnx", "INT8: equal likeliest tokens", agree, "", LEAST_AGREEMENT)
    for context, goal in INT8_SIZES:
        programs = {
            "eager": decoding(DecoderBackend(eager), 1, context, 32),
            "onnx": decoding(int8, 1, context, 32),
        }
        ms = cpu_ms(programs, repeats)
        int8.drop(0)
        note = f"{ms['eager'] / 32:.2f} CPU ms a token against {ms['onnx'] / 32:.2f}"
        what = f"INT8, 1 row at {context}, eager over onnx"
        yield Figure("onnx", what, ms["eager"] / ms["onnx"], "x", goal, note=note)


def scored(backend: OnnxBackend, row: list[int]) -> Tensor:
    """Logits at every position, token by token as in decoding."""
    backend.add(0, drafts=False)
    logits = [backend.read([0], [[token]], [1])[0] for token in row]
    backend.drop(0)
    return torch.cat(logits)
