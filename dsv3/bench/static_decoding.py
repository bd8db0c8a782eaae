"""Greedy decoding over caches of fixed places, ours and transformers', after a long context."""

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from dsv3.bench.compared import EXPERTS, drawn_anew, ours
from dsv3.bench.measuring import Figure
from dsv3.bench.on_device import reason, release, size_on, timed
from dsv3.inference.sampling import likeliest
from dsv3.inference.static_backend import BLOCK, StaticRows
from dsv3.model.decoder import Decoder
from dsv3.model.layers import cached_weight_casts


def decode(repeats: int, device: torch.device) -> Iterator[Figure]:
    """Tokens per second of greedy decoding after a long context against transformers' static cache.

    The caches hold random numbers: what is in them changes no time. Ours chooses through the engine's `likeliest`,
    which brings the tokens to the host; transformers' tokens stay on the device.
    """
    size = size_on(device)
    context, tokens = (4096, 64) if device.type == "cuda" else (48, 4)
    for rows in (1, 32):
        config, model = ours(size, "precision=bf16", device=device)
        with torch.inference_mode(), cached_weight_casts(model.eval()):
            seconds = {"ours": timed(our_decoding(model, rows, context, tokens), repeats)}
        del model
        release()
        with torch.device(device):
            twin = drawn_anew(config, dtype=torch.bfloat16, experts=EXPERTS[-1]).eval()
        for compiled in (False, *[True] * (device.type == "cuda")):
            name = "static cache, compiled" if compiled else "static cache"
            try:
                with torch.no_grad():
                    seconds[name] = timed(their_decoding(twin, rows, context, tokens, compiled=compiled), repeats)
            except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
                print(f"transformers, {name}: {reason(error)}", file=sys.stderr)
            release()
        del twin
        release()
        rival = min((name for name in seconds if name != "ours"), key=lambda name: seconds[name])
        ms = {name: 1000 * value / tokens for name, value in seconds.items()}
        note = f"{ms['ours']:.2f} ms a step against {ms[rival]:.2f} ({rival}); {config.model.n_layers} layers"
        what = f"{rows} rows at {context} of context: tokens/s against transformers"
        yield Figure("decode", what, seconds[rival] / seconds["ours"], "x", 3.0, note=note)


def our_decoding(model: Decoder, rows: int, context: int, tokens: int) -> Callable[[], None]:
    static = StaticRows(model, rows, -(-(context + tokens) // BLOCK) * BLOCK)
    for layer in static.layers:
        layer.held.normal_()

    def program() -> None:
        last = [1] * rows
        for place in range(context, context + tokens):
            last = likeliest(static.step(last, [place] * rows).logits_BV[:rows])

    return program


def their_decoding(model: Any, rows: int, context: int, tokens: int, *, compiled: bool) -> Callable[[], None]:
    from transformers import StaticCache

    cache: Any = StaticCache(config=model.config, max_cache_len=context + tokens)
    first = torch.ones(rows, 1, dtype=torch.int64, device=model.device)
    model(input_ids=first, past_key_values=cache, use_cache=True)  # makes its tensors
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    forward = torch.compile(model.forward, mode="reduce-overhead") if compiled else model.forward

    def program() -> None:
        last = first
        for layer in cache.layers:
            layer.cumulative_length.fill_(context)
        for place in range(context, context + tokens):
            positions = torch.full((rows, 1), place, device=model.device)
            out = forward(input_ids=last, past_key_values=cache, use_cache=True, position_ids=positions)
            last = out.logits[:, -1].argmax(-1, keepdim=True).clone()

    return program
