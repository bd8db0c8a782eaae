"""Turns of rollouts: continuations of prompts, each with random numbers of its own and every log-probability.

Rows are decoded together by the engine, as all text is. What a row draws depends on its seed and its prompt alone, but
for rounding: not on the rows beside it, their order, or the rank that decodes it.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dsv3.contracts import Tokenizer, Turn
from dsv3.inference.engine import complete
from dsv3.inference.engines import Source, backend_of, weights_stay
from dsv3.inference.sampling import Chance, Sampled, Settings
from dsv3.model.decoder import Decoder

AT_ONCE = 64
"""Rows decoded together: bounds the memory of their caches."""


class Recorded:
    """Draws tokens, and keeps the log-probability of each under the distribution that it was drawn from."""

    def __init__(self, sampled: Sampled) -> None:
        self.sampled = sampled
        self.log_probs: list[float] = []

    def draft(self, logits_V: Tensor) -> int:
        raise NotImplementedError("rollouts are decoded without drafts")

    def verify(self, logits_SV: Tensor, drafts: Sequence[int]) -> tuple[int, int]:
        p_V = self.sampled.distribution(logits_SV[0])
        token = self.sampled.chance.draw(p_V)
        self.log_probs.append(math.log(float(p_V[token])))
        return 0, token


@torch.no_grad()
def sample(
    source: Source,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[int],
    *,
    max_tokens: int,
    temperature: float,
    experts: bool = False,
) -> list[Turn]:
    """A continuation of each prompt, ended by EOS or after `max_tokens`, drawn by its own seed. `experts`: record those
    of every token.

    Raises:
        ValueError: a setting is out of its range, or the temperature 0.
    """
    if temperature <= 0:
        raise ValueError(f"temperature={temperature}: must be above 0, since rollouts are drawn")
    settings = [
        Settings(max_tokens=max_tokens, temperature=temperature, eos=(tokenizer.eos,), seed=seed) for seed in seeds
    ]
    choices = [
        Recorded(Sampled(temperature=temperature, chance=Chance(torch.Generator().manual_seed(one.seed))))
        for one in settings
    ]
    model = source if isinstance(source, Decoder) else None
    was_training = model is not None and model.training
    if model is not None:
        model.eval()
    try:
        with weights_stay(source):
            found = complete(
                backend_of(source),
                prompts,
                settings,
                decode=tokenizer.decode,
                at_once=AT_ONCE,
                choices=choices,
                experts=experts,
            )
    finally:
        if model is not None:
            model.train(was_training)
    return [
        Turn(
            list(prompt),
            [*one.ids, tokenizer.eos] if one.finished == "eos" else one.ids,
            tokenizer.decode(one.ids),
            one.finished == "eos",
            choice.log_probs,
            one.experts,
        )
        for prompt, one, choice in zip(prompts, found, choices, strict=True)
    ]
