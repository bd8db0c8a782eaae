"""Backends of the engine: the contract, and the eager one, a `Decoder` with its KV caches.

Shape legend: B rows, T positions, X positions of all rows, V vocabulary.
"""

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from dsv3.contracts import Routing
from dsv3.inference.prefixes import padded
from dsv3.inference.speculation import DecoderModules, Drafter
from dsv3.model.decoder import Caches, Decoder
from dsv3.planning.draft_costs import EAGER, DraftCosts, draft_costs


class Backend(Protocol):
    """Rows are known by numbers that the engine gives them; each is as long as what was read of it.

    While rows are held the weights must not change.
    """

    shares_prefixes: bool  # whether `copy` may be called
    most_ragged: int  # tokens that one pass reads of very unlike rows without padding

    @property
    def draft_costs(self) -> DraftCosts | None:
        """None where it cannot draft."""

    def add(self, row: int, *, drafts: bool) -> None:
        """Hold an empty row; with `drafts` tokens are drafted for it too.

        Raises ValueError where the model cannot draft.
        """

    def copy(self, source: int, row: int, length: int) -> None:
        """Let a row that is empty hold the first `length` positions of `source`, computed once."""

    def drop(self, row: int) -> None: ...

    def rewind(self, row: int, length: int) -> None:
        """Forget every position of a row at or after `length`: drafts that were not kept."""

    def rest(self, row: int, length: int) -> None:
        """As `rewind`, of a row that is only copied from after this."""

    def read(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], wanted: Sequence[int]) -> list[Tensor]:
        """Append each row's tokens, 1 or more, not as many in each; float32 logits [wanted[b], V] after the last ones.

        A row's logits do not depend on the rows beside it, but for rounding.
        """

    def chosen_experts(self) -> list[dict[str, Tensor]]:
        """Of each row of the latest `read`, what every MoE layer of the main model chose for the tokens that it was
        given: int64 [T, K] on the CPU, by the layer's name; no layer where the model is dense or does not tell.
        """

    def draft(
        self,
        rows: Sequence[int],
        texts: Sequence[Sequence[int]],
        counts: Sequence[int],
        choose: Sequence[Callable[[Tensor], int]],
    ) -> list[list[int]]:
        """Propose counts[b] tokens after each text, of which all tokens but the last were read.

        `choose` draws a token of row b from logits [V].
        """


class RowCaches(Protocol):
    """What holds the rows of a model, or of the graph of one."""

    @property
    def lengths(self) -> dict[int, int]: ...

    @property
    def position_bytes(self) -> int: ...

    def add(self, row: int) -> None: ...

    def copy(self, source: int, row: int, length: int) -> None: ...

    def drop(self, row: int) -> None: ...

    def rewind(self, row: int, length: int) -> None: ...


class DraftingBackend:
    """The part of a backend that keeps the rows of its caches and of its drafter together; `read` is left to it."""

    shares_prefixes, most_ragged = True, 0
    caches: RowCaches
    drafter: Drafter

    @property
    def position_bytes(self) -> int:
        """That a row holds at most for each position."""
        return self.caches.position_bytes + self.drafter.position_bytes

    def add(self, row: int, *, drafts: bool) -> None:
        if drafts:
            self.drafter.add(row)
        self.caches.add(row)

    def copy(self, source: int, row: int, length: int) -> None:
        self.caches.copy(source, row, length)
        if self.drafter.holds(row):
            self.drafter.copy(source, row, length)

    def drop(self, row: int) -> None:
        self.caches.drop(row)
        if self.drafter.holds(row):
            self.drafter.drop(row)

    def rewind(self, row: int, length: int) -> None:
        self.caches.rewind(row, length)
        if self.drafter.holds(row):
            self.drafter.rewind(row, length)

    def rest(self, row: int, length: int) -> None:
        self.rewind(row, length)

    def draft(
        self,
        rows: Sequence[int],
        texts: Sequence[Sequence[int]],
        counts: Sequence[int],
        choose: Sequence[Callable[[Tensor], int]],
    ) -> list[list[int]]:
        return self.drafter.draft(rows, texts, counts, choose)


class DecoderBackend(DraftingBackend):
    """A `Decoder` over its caches, with its MTP modules as the drafter."""

    most_ragged = 40  # each attends by itself: more of them are sooner read padded, or in two passes
    caches: Caches

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.caches = model.new_caches()
        self.drafter = Drafter(DecoderModules(model))
        self._routings: Mapping[str, Routing] = {}  # of the latest `read`
        self.places: list[slice] = []  # where each row's tokens lie in its pass

    @cached_property
    def draft_costs(self) -> DraftCosts | None:
        return draft_costs(self.model, EAGER)

    def read(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], wanted: Sequence[int]) -> list[Tensor]:
        counts = list(map(len, tokens))
        last_XD = self._states(rows, tokens, counts)
        hidden_XD = self.model.norm(last_XD)
        h_XD = hidden_XD if self.model.mtp.after_final_norm else last_XD
        for row, place in zip(rows, self.places, strict=True):
            if self.drafter.holds(row):
                self.drafter.read([row], h_XD[place].unsqueeze(0))
        if not any(wanted):
            return [hidden_XD.new_empty(0, 0)] * len(rows)
        asked = [hidden_XD[place][count - n :] for place, count, n in zip(self.places, counts, wanted, strict=True)]
        return list(self.model.logits(torch.cat(asked)).split(list(wanted)))

    def _states(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], counts: list[int]) -> Tensor:
        """States [X, D] of one pass; those of row b's tokens are at `places[b]`. Rows are padded to the longest, or
        read token by token where most would be padding."""
        longest, flat = max(counts), None
        if sum(counts) <= self.most_ragged and longest * len(rows) > 2 * sum(counts):
            flat = self.caches.by_token(rows, counts)
        starts = [longest * b for b in range(len(rows))] if flat is None else [0, *itertools.accumulate(counts)]
        self.places = [slice(start, start + count) for start, count in zip(starts, counts)]
        if flat is not None:
            tokens_X1 = torch.tensor([[token] for ids in tokens for token in ids], device=self.model.device)
            last_X1D, self._routings = self.model.decode_states(tokens_X1, flat)
            return last_X1D.flatten(0, 1)
        held = self.caches.select(rows)
        before = held.lengths
        last_BTD, self._routings = self.model.decode_states(padded(tokens, self.model.device), held)
        for row, count in zip(rows, counts, strict=True):
            if count < longest:
                self.caches.rewind(row, before[row] + count)
        return last_BTD.flatten(0, 1)

    def chosen_experts(self) -> list[dict[str, Tensor]]:
        if not self._routings:
            return [{} for _ in self.places]
        experts_LNK = torch.stack([routing.experts_NK for routing in self._routings.values()]).cpu()  # one transfer
        by_layer = dict(zip(self._routings, experts_LNK, strict=True))
        return [{name: experts_NK[place] for name, experts_NK in by_layer.items()} for place in self.places]

    def used_experts(self) -> dict[str, Tensor]:
        """As `chosen_experts`, of all rows together: int64 [M] by layer."""
        chosen = self.chosen_experts()
        return {name: torch.cat([of_row[name] for of_row in chosen]).flatten() for name in self._routings}
