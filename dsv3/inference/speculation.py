"""Drafts of further tokens by multi-token prediction, for speculative decoding (report section 5.4.3).

The model has read t_0 .. t_i of a row, and t_(i+1) is chosen but not read yet. Module k then takes h_i^(k-1) and
t_(i+k), and the head's likeliest token is the draft of t_(i+k+1): D modules in turn draft D tokens, each from the draft
before. For more than D the last module goes on with its own output in place of a deeper one's. The main model then
reads t_(i+1) and all drafts at once, and says which it keeps.

Several rows are drafted for together; each has a length of its own, and shorter pieces are padded at their end.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dsv3.contracts import Cache
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


class RowCache(Protocol):
    """A cache of rows, as far as the drafter needs one."""

    @property
    def lengths(self) -> dict[int, int]: ...

    def add(self, row: int) -> None: ...

    def copy(self, source: int, row: int, length: int) -> None: ...

    def drop(self, row: int) -> None: ...

    def rewind(self, row: int, length: int) -> None: ...


class DraftModules(Protocol):
    """MTP's modules and their caches."""

    width: int  # D
    dtype: torch.dtype  # of states
    device: torch.device
    normed: bool  # whether the first module takes the main model's states after the final norm

    @property
    def caches(self) -> Sequence[RowCache]:
        """One for each module."""

    def extend(
        self, k: int, rows: Sequence[int], pieces: Sequence[Tensor], tokens: Sequence[Sequence[int]]
    ) -> tuple[Sequence[Tensor], Tensor, Tensor]:
        """Module k, from 1, over further positions of each row: h^(k-1) [T, D] and, as many, the tokens k places on.

        Returns h^k [T, D] of each row, and at its last position the state after the module's norm, [B, D], and float32
        logits [B, V]. Row b's cache grows by T positions or, with padding, by more.
        """


class DecoderModules:
    """Those of a `Decoder`."""

    def __init__(self, model: Decoder) -> None:
        self.model, self.normed = model, model.mtp.after_final_norm
        self.caches: Sequence[Cache] = model.mtp.new_caches()
        self.width, self.dtype = model.embed_tokens.embedding_dim, model.precision.activation_dtype
        self.device = model.device

    def extend(
        self, k: int, rows: Sequence[int], pieces: Sequence[Tensor], tokens: Sequence[Sequence[int]]
    ) -> tuple[Sequence[Tensor], Tensor, Tensor]:
        h_BTD, tokens_BT = pad_sequence(list(pieces), batch_first=True), padded(tokens, self.device)
        cache = self.caches[k - 1].select(rows)
        h_BTD, hidden_BTD = self.model.mtp.extend(k, h_BTD, tokens_BT, self.model.embed, cache)
        hidden_BD = torch.stack([x_TD[len(ids) - 1] for x_TD, ids in zip(hidden_BTD, tokens, strict=True)])
        states = [x_TD[: len(ids)] for x_TD, ids in zip(h_BTD, tokens, strict=True)]
        return states, hidden_BD, self.model.logits(hidden_BD)


class Drafter:
    """Drafts by MTP's modules."""

    def __init__(self, modules: DraftModules) -> None:
        self.modules, self.caches = modules, modules.caches
        # h^k of the positions read, k from 0: module k + 1 may have to read one again when a draft is not kept.
        self.states = [PositionCache(modules.width, dtype=modules.dtype, device=modules.device) for _ in modules.caches]

    @property
    def position_bytes(self) -> int:
        """Of a row, for each position that it holds."""
        return sum(part.position_bytes for part in (*self.states, *self.caches) if hasattr(part, "position_bytes"))

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
        latest: list[Tensor] = [self.states[0].empty] * len(rows)  # [D]: what a further module takes
        # A single module goes on as from the main model's states, which may be those after a norm.
        normed = len(self.caches) == 1 and self.modules.normed
        for k in range(1, max(counts) + 1):
            active = [b for b, count in enumerate(counts) if count >= k]
            chosen = [rows[b] for b in active]
            if k <= len(self.caches):
                states, hidden_BD, logits_BV = self._module(k, chosen, [[*texts[b], *drafts[b]] for b in active])
            else:
                pieces = [latest[b].unsqueeze(0) for b in active]
                states, hidden_BD, logits_BV = self.modules.extend(
                    len(self.caches), chosen, pieces, [drafts[b][-1:] for b in active]
                )
            for i, b in enumerate(active):
                latest[b] = hidden_BD[i] if normed else states[i][-1]
                drafts[b].append(choose[b](logits_BV[i]))
        last, read = self.caches[-1], self.states[0].lengths
        for row in rows:
            last.rewind(row, min(last.lengths[row], read[row]))
        return drafts

    def _module(
        self, k: int, rows: Sequence[int], texts: Sequence[Sequence[int]]
    ) -> tuple[Sequence[Tensor], Tensor, Tensor]:
        """Module k over the positions that it has not read, or has read with a draft that was not kept."""
        cache, read = self.caches[k - 1], self.states[0].lengths
        # What stands at position j was made from t_(j+k): a draft, unless that is older than the newest token.
        starts = [max(0, min(cache.lengths[row], read[row] - k)) for row in rows]
        for row, start in zip(rows, starts, strict=True):
            cache.rewind(row, start)
        pieces = [self.states[k - 1].rows[r].first(read[r])[start:] for r, start in zip(rows, starts, strict=True)]
        known = [text[start + k : read[row] + k] for row, start, text in zip(rows, starts, texts, strict=True)]
        states, hidden_BD, logits_BV = self.modules.extend(k, rows, pieces, known)
        for row, start, h_TD in zip(rows, starts, states, strict=True):
            cache.rewind(row, read[row])  # without padding
            if k < len(self.caches):
                self.states[k].rewind(row, start)
                self.states[k].select([row]).append(h_TD.unsqueeze(0))
        return states, hidden_BD, logits_BV
