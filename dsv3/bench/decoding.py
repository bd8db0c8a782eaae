"""Seconds per token of decoding after a long prompt, ours over cached latents against transformers'."""

from collections.abc import Callable, Iterator
from typing import Any

import torch

from dsv3.bench.compared import EXPERTS, STANDARD, ours, theirs
from dsv3.bench.measuring import Figure, fastest, interleaved
from dsv3.bench.training_step import DTYPES
from dsv3.model.layers import cached_weight_casts

CONTEXT, TOKENS = 4096, 16


def decode(repeats: int, device: torch.device) -> Iterator[Figure]:
    """Greedy decoding at a context of 4096: the time of 16 further tokens, without that of the prompt."""
    for precision, goal in (("bf16", 8.0), ("fp32", None)):
        config, model = ours(STANDARD, f"precision={precision}", "mtp=none", device=device)
        generator = torch.Generator().manual_seed(0)
        prompt = torch.randint(0, config.model.vocab_size, (1, CONTEXT), generator=generator).to(device)
        twins = {e: theirs(config, model, dtype=DTYPES[precision], experts=e).eval() for e in EXPERTS}
        rivals = {e: their_decoding(twin, prompt) for e, twin in twins.items()}
        rival = fastest(rivals)
        programs = {"ours": our_decoding(model.eval(), prompt), "theirs": rivals[rival]}
        with cached_weight_casts(model):  # theirs are in their format to begin with
            seconds = interleaved(programs, repeats=repeats)
        ms = {side: 1000 * value / TOKENS for side, value in seconds.items()}
        note = f"{ms['ours']:.1f} ms a token against {ms['theirs']:.1f} ({rival})"
        ratio = seconds["theirs"] / seconds["ours"]
        yield Figure("decode", f"tokens/s at {CONTEXT} of context, {precision}", ratio, "x", goal, note=note)


def our_decoding(model: Any, prompt_1T: torch.Tensor) -> Callable[[], None]:
    """Decodes over a cache that the prompt has filled; each call begins at the prompt's end again."""
    caches = model.new_caches([0])
    with torch.no_grad():
        first = int(model.decode(prompt_1T, caches)[0, -1].argmax())

    @torch.no_grad()
    def program() -> None:
        caches.rewind(0, CONTEXT)
        token = first
        for _ in range(TOKENS):
            token = int(model.decode(torch.tensor([[token]], device=prompt_1T.device), caches)[0, -1].argmax())

    return program


def their_decoding(model: Any, prompt_1T: torch.Tensor) -> Callable[[], None]:
    with torch.no_grad():
        filled = model(input_ids=prompt_1T, use_cache=True)
    first, cache = int(filled.logits[0, -1].argmax()), filled.past_key_values

    @torch.no_grad()
    def program() -> None:
        if (extra := cache.get_seq_length() - CONTEXT) > 0:
            cache.crop(-extra)
        token = first
        for _ in range(TOKENS):
            logits = model(
                input_ids=torch.tensor([[token]], device=prompt_1T.device), past_key_values=cache, use_cache=True
            ).logits
            token = int(logits[0, -1].argmax())

    return program
