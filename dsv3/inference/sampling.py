"""How the next token is chosen from logits, alone or among drafts that something cheaper proposed.

Drafts d_1 .. d_n, drawn from distributions q_1 .. q_n, are verified in turn against the model's own p_1 .. p_n+1
(arXiv 2211.17192): d_j is kept with probability min(1, p_j(d_j) / q_j(d_j)); the first one that is not is replaced by a
draw from max(p_j - q_j, 0), normalised, and what follows it is dropped; if all are kept, one more token is drawn from
p_n+1. The tokens then have exactly the model's distribution. Greedily, p_j and q_j are all on their likeliest token.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class Choice(Protocol):
    """Draws drafts and verifies them; one for each text."""

    def draft(self, logits_V: Tensor) -> int:
        """A token from a drafter's logits."""

    def verify(self, logits_SV: Tensor, drafts: Sequence[int]) -> tuple[int, int]:
        """How many of the S - 1 drafts are kept, and the token after them; each draft came from one call of `draft`."""


class Greedy:
    """Always the likeliest token."""

    def draft(self, logits_V: Tensor) -> int:
        return int(logits_V.max(-1).indices)  # much faster than argmax on a CPU

    def verify(self, logits_SV: Tensor, drafts: Sequence[int]) -> tuple[int, int]:
        likeliest = logits_SV.max(-1).indices.tolist()
        kept = 0
        while kept < len(drafts) and drafts[kept] == likeliest[kept]:
            kept += 1
        return kept, likeliest[kept]


class Chance:
    """Randomness, from a generator (None: torch's own)."""

    def __init__(self, generator: torch.Generator | None) -> None:
        self.generator = generator

    def happens(self, probability: float) -> bool:
        return float(torch.rand((), generator=self.generator)) < probability

    def draw(self, weights_V: Tensor) -> int:
        """An index, each as likely as its share of the weights' sum."""
        return int(torch.multinomial(weights_V, 1, generator=self.generator))


class Sampled:
    """A draw from softmax(logits / temperature), cut to the smallest set of tokens that holds `top_p` of it."""

    def __init__(self, *, temperature: float, top_p: float, chance: Chance) -> None:
        self.temperature, self.top_p, self.chance = temperature, top_p, chance
        self.drafted: list[Tensor] = []  # the distributions of the drafts not verified yet

    def draft(self, logits_V: Tensor) -> int:
        self.drafted.append(self.distribution(logits_V))
        return self.chance.draw(self.drafted[-1])

    def verify(self, logits_SV: Tensor, drafts: Sequence[int]) -> tuple[int, int]:
        p_SV, q_SV = self.distribution(logits_SV), self.drafted
        self.drafted = []
        for kept, token in enumerate(drafts):
            p_V, q_V = p_SV[kept], q_SV[kept]
            if not self.chance.happens(float(p_V[token] / q_V[token])):
                return kept, self.chance.draw((p_V - q_V).clamp(min=0))
        return len(drafts), self.chance.draw(p_SV[len(drafts)])

    def distribution(self, logits: Tensor) -> Tensor:
        """Probabilities over the last axis, in the order of the vocabulary."""
        probabilities = (logits / self.temperature).softmax(-1)
        if self.top_p == 1:
            return probabilities
        ordered, order = probabilities.sort(dim=-1, descending=True)
        ordered = ordered.masked_fill(ordered.cumsum(-1) - ordered >= self.top_p, 0.0)
        return torch.zeros_like(probabilities).scatter(-1, order, ordered / ordered.sum(-1, keepdim=True))


def choice_of(temperature: float, top_p: float, generator: torch.Generator | None) -> Choice:
    """Greedy at temperature 0."""
    if temperature == 0:
        return Greedy()
    return Sampled(temperature=temperature, top_p=top_p, chance=Chance(generator))
