"""Backends of the engine: the contract, and the eager one, a `Decoder` with its KV caches.

Shape legend: B rows, T positions, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from dsv3.contracts import Routing
from dsv3.inference.prefixes import padded
from dsv3.inference.speculation import DecoderModules, Drafter
from dsv3.model.decoder import Caches, Decoder


class Backend(Protocol):
    """Rows are known by numbers that the engine gives them; each is as long as what was read of it.

    While rows are held the weights must not change.
    """

    shares_prefixes: bool  # whether `copy` may be called

    def add(self, row: int, *, drafts: bool) -> None:
        """Hold an empty row; with `drafts` tokens are drafted for it too.

        Raises ValueError where the model cannot draft.
        """

    def copy(self, source: int, row: int, length: int) -> None:
        """Let a row that is empty hold the first `length` positions of `source`, computed once."""

    def drop(self, row: int) -> None: ...

    def rewind(self, row: int, length: int) -> None:
        """Forget every position of a row at or after `length`: drafts that were not kept."""

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

    def add(self, row: int) -> None: ...

    def copy(self, source: int, row: int, length: int) -> None: ...

    def drop(self, row: int) -> None: ...

    def rewind(self, row: int, length: int) -> None: ...


class DraftingBackend:
    """The part of a backend that keeps the rows of its caches and of its drafter together; `read` is left to it."""

    shares_prefixes = True
    caches: RowCaches
    drafter: Drafter

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

    caches: Caches

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.caches = model.new_caches()
        self.drafter = Drafter(DecoderModules(model))
        self._routings: Mapping[str, Routing] = {}  # of the latest `read`
        self._counts: list[int] = []  # tokens of each of its rows

    def read(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], wanted: Sequence[int]) -> list[Tensor]:
        self._counts = ends = [len(ids) for ids in tokens]
        held = self.caches.select(rows)
        starts = held.lengths
        last_BTD, self._routings = self.model.decode_states(padded(tokens, self.model.device), held)
        hidden_BTD = self.model.norm(last_BTD)
        drafted = [b for b, row in enumerate(rows) if self.drafter.holds(row)]
        if drafted:
            h_BTD = hidden_BTD if self.model.mtp.after_final_norm else last_BTD
            self.drafter.read([rows[b] for b in drafted], h_BTD if len(drafted) == len(rows) else h_BTD[drafted])
        for row, end in zip(rows, ends, strict=True):
            if end < last_BTD.shape[1]:
                self.rewind(row, starts[row] + end)  # without padding
        if not any(wanted):
            return [hidden_BTD.new_empty(0, 0)] * len(rows)
        asked = [hidden_D[end - n : end] for hidden_D, end, n in zip(hidden_BTD, ends, wanted, strict=True)]
        return list(self.model.logits(torch.cat(asked)).split(list(wanted)))

    def chosen_experts(self) -> list[dict[str, Tensor]]:
        rows = len(self._counts)
        by_layer = {name: routing.experts_NK.unflatten(0, (rows, -1)).cpu() for name, routing in self._routings.items()}
        return [
            {name: experts_BTK[b, :count] for name, experts_BTK in by_layer.items()}
            for b, count in enumerate(self._counts)
        ]
