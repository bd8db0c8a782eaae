"""Several prompts continued at once, over caches whose rows all have the same length.

Decoding begins where the shortest prompt ends. A row whose prompt is longer goes on being fed its prompt, one token a
step, while the others already generate: no padding, so positions and caches are those of each row alone.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3.inference.scored_model import ScoredModel


class Sampling(NamedTuple):
    temperature: float  # 0: always the likeliest token
    top_p: float  # of the probability, held by the likeliest tokens, that is sampled from


def continue_rows(
    model: ScoredModel,
    prompts: Sequence[Sequence[int]],
    *,
    max_tokens: int,
    sampling: Sampling,
    generators: Sequence[torch.Generator],
    stopped: Callable[[int, list[int]], bool],
) -> list[list[int]]:
    """Up to `max_tokens` ids after each prompt, ending before an end of text or where `stopped(row, ids)` says so.

    `generators`: of each row, so that what is drawn does not depend on which rows stand together.
    """
    shortest, longest = min(map(len, prompts)), max(map(len, prompts))
    decoding = model.begin(prompts, longest + max_tokens)
    answers: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    tokens_BT = torch.tensor([prompt[decoding.length : shortest] for prompt in prompts], device=model.device)
    for position in range(shortest, longest + max_tokens):
        logits_BV = decoding.feed(tokens_BT)
        following = [prompt[position] if position < len(prompt) else 0 for prompt in prompts]
        active = [row for row, prompt in enumerate(prompts) if position >= len(prompt) and not done[row]]
        drawn = choose(logits_BV[active], sampling, [generators[row] for row in active]) if active else []
        for row, token in zip(active, drawn, strict=True):
            following[row] = token
            if token not in model.eos:
                answers[row].append(token)
            done[row] = token in model.eos or len(answers[row]) == max_tokens or stopped(row, answers[row])
        if all(done):
            break
        tokens_BT = torch.tensor(following, device=model.device).unsqueeze(1)
    return answers


def choose(logits_BV: Tensor, sampling: Sampling, generators: Sequence[torch.Generator]) -> list[int]:
    """The next id of each row."""
    if sampling.temperature == 0:
        return logits_BV.max(-1).indices.tolist()  # much faster than argmax on a CPU
    weights_BV = (logits_BV / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        sorted_BV, order_BV = weights_BV.sort(descending=True)
        outside_BV = sorted_BV.cumsum(-1) - sorted_BV >= sampling.top_p
        weights_BV = weights_BV.masked_fill(outside_BV.gather(1, order_BV.argsort(-1)), 0.0)
    # In the vocabulary's order, not in that of the probabilities, which rounding may change where two are near.
    return [int(torch.multinomial(w, 1, generator=g)) for w, g in zip(weights_BV.cpu(), generators, strict=True)]
