"""Drafts of further tokens by multi-token prediction, for speculative decoding (report section 5.4.3).

The model has read t_0 .. t_i, and t_(i+1) is chosen but not read yet. Module k then takes h_i^(k-1) and t_(i+k) and its
likeliest token is the draft of t_(i+k+1): the D modules in turn draft D tokens, each from the draft before. The main
model reads t_(i+1) and all drafts at once, and says which it keeps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3.model import Decoder


@dataclass
class DraftCount:
    """How the drafts of a generation fared."""

    passes: int = 0  # of the main model, the prompt's included
    made: int = 0
    kept: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the drafts that were kept; 0 where none was made."""
        return self.kept / max(self.made, 1)


class Drafter:
    """A model's MTP modules over caches of their own, for one row of up to `capacity` positions."""

    def __init__(self, model: Decoder, capacity: int) -> None:
        if not model.mtp.depth:
            raise ValueError("speculative decoding needs a model with MTP modules, and this one has none (mtp=none)")
        self.model = model
        self.caches = model.mtp.new_caches(1, capacity)
        width = model.embed_tokens.embedding_dim
        # h^k of the positions read, k from 0: module k + 1 may have to read one again when a draft is not kept.
        self.states_1CD = [
            torch.empty(1, capacity, width, dtype=model.precision.activation_dtype, device=model.device)
            for _ in self.caches
        ]
        self.positions = 0

    def read(self, h_1TD: Tensor) -> None:
        """Add the main model's states of T further positions: what its MTP takes, of tokens that are kept."""
        end = self.positions + h_1TD.shape[1]
        self.states_1CD[0][:, self.positions : end] = h_1TD
        self.positions = end

    def draft(self, tokens: Sequence[int], count: int, choose: Callable[[Tensor], int]) -> list[int]:
        """Propose `count` tokens after `tokens`, which are those of the positions read and one more.

        `choose` draws a token from logits [V].
        """
        drafts: list[int] = []
        h_11D: Tensor | None = None
        for _ in range(count):
            h_11D, logits_V = self._next(tokens, drafts, h_11D)
            drafts.append(choose(logits_V))
        self.caches[-1].rewind(min(self.caches[-1].length, self.positions))
        return drafts

    def _next(self, tokens: Sequence[int], drafts: Sequence[int], h_11D: Tensor | None) -> tuple[Tensor, Tensor]:
        """The next draft's logits [V], and the state that stands for a main model's where the last module goes on."""
        model, depth, k = self.model, len(self.caches), len(drafts) + 1
        if k <= depth:
            h_1TD, hidden_1TD = self._extend(tokens, drafts, k)
        else:
            module_input = torch.tensor([[(*tokens[-depth:], *drafts)[-1]]], device=model.device)
            assert h_11D is not None
            h_1TD, hidden_1TD = model.mtp.extend(depth, h_11D, module_input, model.embed, self.caches[-1])
        normed = depth == 1 and model.mtp.after_final_norm
        return (hidden_1TD if normed else h_1TD)[:, -1:], model.logits(hidden_1TD[:, -1])[0]

    def _extend(self, tokens: Sequence[int], drafts: Sequence[int], k: int) -> tuple[Tensor, Tensor]:
        """Module k over the positions that it has not read, or read with a draft that was not kept."""
        cache = self.caches[k - 1]
        # What stands at position j was made from t_(j+k): a draft, unless that is older than the newest token.
        start = max(0, min(cache.length, self.positions - k))
        cache.rewind(start)
        known = [*tokens[start + k :], *drafts][: self.positions - start]
        known_1T = torch.tensor([known], device=self.model.device)
        h_1TD = self.states_1CD[k - 1][:, start : self.positions]
        h_1TD, hidden_1TD = self.model.mtp.extend(k, h_1TD, known_1T, self.model.embed, cache)
        if k < len(self.caches):
            self.states_1CD[k][:, start : self.positions] = h_1TD
        return h_1TD, hidden_1TD
