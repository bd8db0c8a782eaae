"""Notes on each token that a row writes: log-probabilities, drafts kept, and a grammar that holds it."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from dsv3.inference.sampling import Choice


class Likelihood(NamedTuple):
    """Of one token, where the model wrote or read it."""

    token: int
    log_prob: float
    best: list[tuple[int, float]]  # the likeliest tokens and their log-probabilities


class Grammar(Protocol):
    """What a text may be; it follows the text token by token."""

    def allowed(self) -> Tensor:
        """bool [V]: tokens that may come next."""

    def accept(self, token: int) -> None: ...


class Recorder:
    """A `Choice` that notes what another one chooses."""

    def __init__(self, choice: Choice, *, best: int | None, grammar: Grammar | None = None) -> None:
        """`best`: how many of the likeliest tokens to note; None: no log-probabilities."""
        self.choice, self.best, self.grammar = choice, best, grammar
        self.likelihoods: list[Likelihood] = []  # of every token chosen, an end of text too
        self.drafts_made = self.drafts_kept = self.passes = 0

    def draft(self, logits_V: Tensor) -> int:
        return self.choice.draft(logits_V)

    def verify(self, logits_SV: Tensor, drafts: Sequence[int]) -> tuple[int, int]:
        masked_SV = logits_SV
        if self.grammar is not None:  # such rows have no drafts
            allowed_V = self.grammar.allowed().to(logits_SV.device)
            masked_SV = logits_SV.masked_fill(~allowed_V, -torch.inf)
        kept, token = self.choice.verify(masked_SV, drafts)
        if self.grammar is not None:
            self.grammar.accept(token)
        self.passes += 1
        self.drafts_made += len(drafts)
        self.drafts_kept += kept
        if self.best is not None:
            self.likelihoods += likelihoods(logits_SV[: kept + 1], [*drafts[:kept], token], self.best)
        return kept, token


def likelihoods(logits_TV: Tensor, tokens: Sequence[int], best: int) -> list[Likelihood]:
    """Of each token under the logits at its place."""
    log_probs_TV = logits_TV.float().log_softmax(-1)
    chosen = log_probs_TV.gather(1, torch.tensor(tokens, device=logits_TV.device).unsqueeze(1)).squeeze(1).tolist()
    values, ids = (part.tolist() for part in log_probs_TV.topk(best))
    return [
        Likelihood(token, log_prob, list(zip(ids_K, values_K, strict=True)))
        for token, log_prob, ids_K, values_K in zip(tokens, chosen, ids, values, strict=True)
    ]
