"""Drafts of further tokens by multi-token prediction, for speculative decoding (report section 5.4.3).

The model has read t_0 .. t_i, and t_(i+1) is chosen but not read yet. Module k then takes h_i^(k-1) and t_(i+k), and
the head's likeliest token is the draft of t_(i+k+1): D modules in turn draft D tokens, each from the draft before. For
more than D the last module goes on with its own output in place of a deeper one's. The main model then reads t_(i+1)
and all drafts at once, and says which it keeps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsv3.model.decoder import Decoder


@dataclass
class Speculation:
    """How many tokens are drafted for each pass of the main model, and how they fared."""

    drafts: int = 2
    passes: int = 0  # the prompt's included
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
        for k in range(1, count + 1):
            if h_11D is None or k <= len(self.caches):
                h_1TD, hidden_1TD = self._module(k, tokens, drafts)
            else:
                h_1TD, hidden_1TD = self._extend(len(self.caches), h_11D, [drafts[-1]])
            # A single module goes on as from the main model's states, which may be those after a norm.
            normed = len(self.caches) == 1 and self.model.mtp.after_final_norm
            h_11D = (hidden_1TD if normed else h_1TD)[:, -1:]
            drafts.append(choose(self.model.logits(hidden_1TD[:, -1])[0]))
        last = self.caches[-1]
        last.rewind(min(last.length, self.positions))
        return drafts

    def _module(self, k: int, tokens: Sequence[int], drafts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Module k over the positions that it has not read, or has read with a draft that was not kept."""
        cache = self.caches[k - 1]
        # What stands at position j was made from t_(j+k): a draft, unless that is older than the newest token.
        start = max(0, min(cache.length, self.positions - k))
        cache.rewind(start)
        known = [*tokens[start + k :], *drafts][: self.positions - start]
        h_1TD, hidden_1TD = self._extend(k, self.states_1CD[k - 1][:, start : self.positions], known)
        if k < len(self.caches):
            self.states_1CD[k][:, start : self.positions] = h_1TD
        return h_1TD, hidden_1TD

    def _extend(self, k: int, h_1TD: Tensor, tokens: list[int]) -> tuple[Tensor, Tensor]:
        tokens_1T = torch.tensor([tokens], device=self.model.device)
        return self.model.mtp.extend(k, h_1TD, tokens_1T, self.model.embed, self.caches[k - 1])
