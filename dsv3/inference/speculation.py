"""Drafts of further tokens by multi-token prediction, for speculative decoding (report section 5.4.3).

The model has read t_0 .. t_i of a row, and t_(i+1) is chosen but not read yet. Module k then takes h_i^(k-1) and
t_(i+k), and the head's likeliest token is the draft of t_(i+k+1): D modules in turn draft D tokens, each from the draft
before. For more than D the last module goes on with its own output in place of a deeper one's. The main model then
reads t_(i+1) and all drafts at once, and says which it keeps.

Several rows are drafted for together; each has a length of its own, and shorter pieces are padded at their end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dsv3.inference.prefixes import padded
from dsv3.model.decoder import Decoder
from dsv3.model.layers import PositionCache


@dataclass
class Speculation:
    """How drafts fared, over all passes of the model that chose tokens."""

    passes: int = 0  # of single rows; the prompt's included
    made: int = 0
    kept: int = 0

    @property
    def acceptance(self) -> float:
        """Share of the drafts that were kept; 0 where none was made."""
        return self.kept / max(self.made, 1)


class Drafter:
    """A model's MTP modules over caches of their own."""

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.caches = model.mtp.new_caches()
        width, dtype = model.embed_tokens.embedding_dim, model.precision.activation_dtype
        # h^k of the positions read, k from 0: module k + 1 may have to read one again when a draft is not kept.
        self.states = [PositionCache(width, dtype=dtype, device=model.device) for _ in self.caches]

    def holds(self, row: int) -> bool:
        return any(row in states.rows for states in self.states[:1])

    def add(self, row: int) -> None:
        """Raises ValueError where there are no modules."""
        if not self.caches:
            raise ValueError("speculative decoding needs a model with MTP modules, and this one has none (mtp=none)")
        for part in (*self.states, *self.caches):
            part.add(row)

    def copy(self, source: int, row: int, length: int) -> None:
        """What the source's first `length` tokens alone made: module k's position j is made from t_(j+k) too."""
        for k, (states, cache) in enumerate(zip(self.states, self.caches, strict=True)):
            states.copy(source, row, max(0, min(states.lengths[source], length - k)))
            cache.copy(source, row, max(0, min(cache.lengths[source], length - k - 1)))

    def drop(self, row: int) -> None:
        for part in (*self.states, *self.caches):
            part.drop(row)

    def read(self, rows: Sequence[int], h_BTD: Tensor) -> None:
        """Add the main model's states of T further positions: what its MTP takes."""
        self.states[0].select(rows).append(h_BTD)

    def rewind(self, row: int, length: int) -> None:
        """Forget the main model's states of positions at or after `length`, none of which was drafted from."""
        self.states[0].rewind(row, length)

    def draft(
        self,
        rows: Sequence[int],
        texts: Sequence[Sequence[int]],
        counts: Sequence[int],
        choose: Sequence[Callable[[Tensor], int]],
    ) -> list[list[int]]:
        """Propose counts[b] tokens after each text, whose tokens are those of the positions read and one more.

        `choose` draws a token of row b from logits [V].
        """
        drafts: list[list[int]] = [[] for _ in rows]
        latest: list[Tensor] = [self.states[0].empty] * len(rows)  # [1, D]: what a further module takes
        for k in range(1, max(counts) + 1):
            active = [b for b, count in enumerate(counts) if count >= k]
            chosen = [rows[b] for b in active]
            if k <= len(self.caches):
                h_B1D, hidden_B1D = self._module(k, chosen, [[*texts[b], *drafts[b]] for b in active])
            else:
                h_B1D = torch.stack([latest[b] for b in active])
                h_B1D, hidden_B1D = self._extend(len(self.caches), chosen, h_B1D, [drafts[b][-1:] for b in active])
            # A single module goes on as from the main model's states, which may be those after a norm.
            normed = len(self.caches) == 1 and self.model.mtp.after_final_norm
            logits_BV = self.model.logits(hidden_B1D[:, -1])
            for b, h_1D, logits_V in zip(active, hidden_B1D if normed else h_B1D, logits_BV, strict=True):
                latest[b] = h_1D
                drafts[b].append(choose[b](logits_V))
        last, read = self.caches[-1], self.states[0].lengths
        for row, length in last.select(rows).lengths.items():
            last.rewind(row, min(length, read[row]))
        return drafts

    def _module(self, k: int, rows: Sequence[int], texts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Module k's states [B, 1, D] at the last position read, after the positions that it has not read, or has read
        with a draft that was not kept."""
        cache, read = self.caches[k - 1], self.states[0].lengths
        # What stands at position j was made from t_(j+k): a draft, unless that is older than the newest token.
        starts = [max(0, min(cache.lengths[row], read[row] - k)) for row in rows]
        for row, start in zip(rows, starts, strict=True):
            cache.rewind(row, start)
        pieces = [self.states[k - 1].rows[r].first(read[r])[start:] for r, start in zip(rows, starts, strict=True)]
        known = [text[start + k : read[row] + k] for row, start, text in zip(rows, starts, texts, strict=True)]
        h_BTD, hidden_BTD = self._extend(k, rows, pad_sequence(pieces, batch_first=True), known)
        filled = [cache]
        if k < len(self.caches):
            for row, start in zip(rows, starts, strict=True):
                self.states[k].rewind(row, start)
            self.states[k].select(rows).append(h_BTD)
            filled.append(self.states[k])
        for row in rows:
            for part in filled:
                part.rewind(row, read[row])  # without padding
        last = [len(piece) - 1 for piece in pieces]

        def at_last(x_BTD: Tensor) -> Tensor:
            return torch.stack([x_TD[i : i + 1] for x_TD, i in zip(x_BTD, last, strict=True)])

        return at_last(h_BTD), at_last(hidden_BTD)

    def _extend(
        self, k: int, rows: Sequence[int], h_BTD: Tensor, tokens: Sequence[Sequence[int]]
    ) -> tuple[Tensor, Tensor]:
        tokens_BT = padded(tokens, self.model.device)
        return self.model.mtp.extend(k, h_BTD, tokens_BT, self.model.embed, self.caches[k - 1].select(rows))
