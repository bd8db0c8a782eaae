"""Sampling: the settings of a text, filters on logits and probabilities, and drafts verified by the model.

Applied in this order, each left out at its default:

    penalties        on logits: repetition, then presence and frequency; greedy decoding has them too
    temperature      logits / temperature
    top_k            on logits: the k largest
    top_p, min_p     on probabilities: the nucleus, then those near the largest

Drafts d_1 .. d_n, drawn from distributions q_1 .. q_n, are verified in turn against the model's own p_1 .. p_n+1
(arXiv 2211.17192): d_j is kept with probability min(1, p_j(d_j) / q_j(d_j)); the first one that is not is replaced by a
draw from max(p_j - q_j, 0), normalised, and what follows it is dropped; if all are kept, one more token is drawn from
p_n+1. The tokens then have exactly the model's distribution. Greedily, p_j and q_j are all on their likeliest token.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor


@dataclass(frozen=True)
class Settings:
    """Of one text.

    Raises ValueError, naming the setting, its value and its range, where one is out of it.
    """

    max_tokens: int
    temperature: float = 0.0  # 0: the likeliest token; otherwise draws from softmax(logits / temperature)
    top_p: float = 1.0  # nucleus: the smallest set of likeliest tokens that holds this share of the probability
    top_k: int = 0  # so many likeliest tokens; 0: all
    min_p: float = 0.0  # tokens at least this share as likely as the likeliest one
    repetition_penalty: float = 1.0  # logits of tokens in prompt and text: divided by it if positive, else multiplied
    presence_penalty: float = 0.0  # subtracted from the logits of tokens in the text so far
    frequency_penalty: float = 0.0  # the same, times how often they stand there
    stop: tuple[str, ...] = ()  # strings that end the text and are no part of it
    eos: tuple[int, ...] = ()  # tokens that do
    seed: int = 0  # of the row's own generator
    drafts: int | None = 0  # tokens that MTP drafts for each pass of the model; 0: none; None: 1 while drafts pay

    @property
    def may_draft(self) -> bool:
        return self.drafts != 0

    def __post_init__(self) -> None:
        for name, holds, range_ in (
            ("max_tokens", self.max_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < math.inf, "at least 0, and finite"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "at least 0 (0: all tokens)"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < math.inf, "above 0, and finite (1: none)"),
            ("presence_penalty", math.isfinite(self.presence_penalty), "a finite number"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty), "a finite number"),
            ("stop", all(self.stop), "strings that are not empty"),
            ("seed", -(2**63) <= self.seed < 2**64, "from -2**63 to 2**64 - 1"),
            ("drafts", self.drafts is None or self.drafts >= 0, "at least 0 (0: none)"),
        ):
            if not holds:  # nan is in no range
                raise ValueError(f"{name}={getattr(self, name)}: must be {range_}")

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def penalised(logits_V: Tensor, settings: Settings, prompt: Sequence[int], text: Sequence[int]) -> Tensor:
    """Logits of the token after `text`, which follows `prompt`."""
    if settings.repetition_penalty != 1:
        logits_V = discouraged(logits_V, {*prompt, *text}, settings.repetition_penalty)
    if settings.presence_penalty or settings.frequency_penalty:
        logits_V = counted(logits_V, text, settings.presence_penalty, settings.frequency_penalty)
    return logits_V


def discouraged(logits_V: Tensor, ids: set[int], penalty: float) -> Tensor:
    """Repetition penalty (arXiv 1909.05858): logits of these tokens divided by it if positive, else multiplied."""
    ids_N = torch.tensor(sorted(ids), dtype=torch.int64, device=logits_V.device)
    old_N = logits_V[ids_N]
    return logits_V.index_copy(0, ids_N, torch.where(old_N < 0, old_N * penalty, old_N / penalty))


def counted(logits_V: Tensor, text: Sequence[int], presence: float, frequency: float) -> Tensor:
    """Less `presence` for each token in the text, and `frequency` for each time that it stands there."""
    counts = Counter(text)
    ids_N = torch.tensor(list(counts), dtype=torch.int64, device=logits_V.device)
    less_N = torch.tensor([presence + frequency * n for n in counts.values()], device=logits_V.device)
    return logits_V.index_add(0, ids_N, less_N.to(logits_V.dtype), alpha=-1)


def top_k_logits(logits: Tensor, k: int) -> Tensor:
    """-inf below the k largest of the last axis; equal ones stay together."""
    smallest = logits.topk(min(k, logits.shape[-1])).values[..., -1:]
    return logits.masked_fill(logits < smallest, float("-inf"))


LIKELIEST = 128
"""Tokens in which a nucleus is looked for before the whole vocabulary is sorted, which takes six times as long."""


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """Normalised over the smallest set of likeliest tokens that holds `top_p`, in the order of the vocabulary."""
    ordered, order = probabilities.topk(min(LIKELIEST, probabilities.shape[-1]))
    if float(ordered.sum(-1).min()) < top_p:
        ordered, order = probabilities.sort(dim=-1, descending=True)
    beyond = ordered.cumsum(-1) - ordered >= top_p
    beyond[..., 0] = False  # a `top_p` below what float32 holds is 0 there
    ordered = ordered.masked_fill(beyond, 0.0)
    return torch.zeros_like(probabilities).scatter(-1, order, ordered / ordered.sum(-1, keepdim=True))


def near_the_likeliest(probabilities: Tensor, min_p: float) -> Tensor:
    """Normalised over the tokens that are at least `min_p` times as likely as the likeliest one (arXiv 2407.01082)."""
    least = min_p * probabilities.amax(-1, keepdim=True)
    kept = probabilities.masked_fill(probabilities < least, 0.0)
    return kept / kept.sum(-1, keepdim=True)


class Choice(Protocol):
    """Draws drafts and verifies them; one for each text."""

    def draft(self, logits_V: Tensor) -> int:
        """A token from a drafter's logits."""

    def verify(self, logits_SV: Tensor, drafts: Sequence[int]) -> tuple[int, int]:
        """How many of the S - 1 drafts are kept, and the token after them; each draft came from one call of `draft`."""


class Greedy:
    """Always the likeliest token."""

    def draft(self, logits_V: Tensor) -> int:
        return likeliest(logits_V.unsqueeze(0))[0]

    def verify(self, logits_SV: Tensor, drafts: Sequence[int]) -> tuple[int, int]:
        best = likeliest(logits_SV)
        kept = 0
        while kept < len(drafts) and drafts[kept] == best[kept]:
            kept += 1
        return kept, best[kept]


def likeliest(logits_SV: Tensor) -> list[int]:
    """Of each row, the first of the largest."""
    if logits_SV.is_cpu:  # a sixth of torch's time
        return cast(list[int], logits_SV.detach().float().numpy().argmax(-1).tolist())
    return logits_SV.max(-1).indices.tolist()


class Chance:
    """Randomness, from a generator on the CPU (None: torch's own)."""

    def __init__(self, generator: torch.Generator | None) -> None:
        self.generator = generator

    def happens(self, probability: float) -> bool:
        return float(torch.rand((), generator=self.generator)) < probability

    def draw(self, weights_V: Tensor) -> int:
        """An index, each as likely as its share of the weights' sum."""
        # In the vocabulary's order, not in that of the probabilities, which rounding may change where two are near.
        # torch.multinomial would draw a number for every token.
        sums_V = weights_V.cpu().double().cumsum(-1)
        drawn = torch.rand((), dtype=torch.float64, generator=self.generator) * sums_V[-1]
        # The product may round up to the whole sum.
        below = torch.minimum(drawn, torch.nextafter(sums_V[-1], sums_V.new_zeros(())))
        return int(torch.searchsorted(sums_V, below, right=True))


class Sampled:
    """A draw from softmax(logits / temperature), after the filters."""

    def __init__(
        self, *, temperature: float, chance: Chance, top_p: float = 1.0, top_k: int = 0, min_p: float = 0.0
    ) -> None:
        self.temperature, self.top_p, self.top_k, self.min_p = temperature, top_p, top_k, min_p
        self.chance = chance
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
                rest_V = (p_V - q_V).clamp(min=0)
                return kept, self.chance.draw(rest_V if rest_V.any() else p_V)  # nothing is left where they round alike
        return len(drafts), self.chance.draw(p_SV[len(drafts)])

    def distribution(self, logits: Tensor) -> Tensor:
        """Probabilities over the last axis, in the order of the vocabulary."""
        logits = logits / self.temperature
        if self.top_k:
            logits = top_k_logits(logits, self.top_k)
        probabilities = logits.softmax(-1)
        if self.top_p < 1:
            probabilities = nucleus(probabilities, self.top_p)
        return near_the_likeliest(probabilities, self.min_p) if self.min_p else probabilities


def choice_of(settings: Settings) -> Choice:
    """Greedy at temperature 0."""
    if settings.temperature == 0:
        return Greedy()
    return Sampled(
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
        chance=Chance(torch.Generator().manual_seed(settings.seed)),
    )
