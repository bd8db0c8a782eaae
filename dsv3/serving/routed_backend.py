"""A backend that notes which experts each token is routed to.

Shape legend: T positions, N positions of all rows, L layers with experts, K experts for each token, E experts.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dsv3.inference.backend import Backend, DecoderBackend, RowCaches
from dsv3.inference.speculation import Drafter
from dsv3.model.decoder import Decoder

OnRouted = Callable[[int, Tensor], None]
"""Is given the first position that was read, and the experts [T, L, K] of it and those after it."""


class TellingBackend(Backend, Protocol):
    """One that tells what its experts did."""

    experts: int  # E; 0 where there are none
    drafter: Drafter

    @property
    def routed(self) -> Sequence[str]:
        """Names of the L layers."""

    @property
    def caches(self) -> RowCaches: ...

    @property
    def position_bytes(self) -> int: ...

    def chosen_experts(self) -> list[Tensor]:
        """Of each row of the latest `read`, the experts of its tokens: int64 [T, L, K]."""


class RoutedDecoder(DecoderBackend):
    """`DecoderBackend` as a `TellingBackend`."""

    def __init__(self, model: Decoder) -> None:
        super().__init__(model)
        moes = [(name, moe) for name, moe in model.moe_layers() if name.startswith("layers.")]
        self.routed = [name for name, _ in moes]
        self.experts = max((len(moe.balancing.bias) for _, moe in moes), default=0)
        self._latest: dict[str, Tensor] = {}
        for name, moe in moes:
            moe.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, arguments: Any, output: Any) -> None:
            self._latest[name] = output[1].experts_NK

        return note

    def chosen_experts(self) -> list[Tensor]:
        chosen_NLK = torch.stack([self._latest[name] for name in self.routed], dim=1)
        return [chosen_NLK[place] for place in self.places]


class RoutedBackend:
    """A backend, and the load of all experts of its main model."""

    def __init__(self, backend: TellingBackend) -> None:
        self.backend, self.layers, self.experts = backend, list(backend.routed), backend.experts
        self.shares_prefixes, self.most_ragged = backend.shares_prefixes, backend.most_ragged
        self.add, self.copy, self.drop, self.draft = backend.add, backend.copy, backend.drop, backend.draft
        self.rewind, self.rest = backend.rewind, backend.rest
        self.listeners: dict[int, OnRouted] = {}  # by row; whoever adds one removes it
        self.load_LE = torch.zeros(len(self.layers), self.experts, dtype=torch.int64)  # tokens of each

    def read(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], wanted: Sequence[int]) -> list[Tensor]:
        starts = {row: self.backend.caches.lengths[row] for row in rows if row in self.listeners}
        logits = self.backend.read(rows, tokens, wanted)
        if self.layers:
            chosen = self.backend.chosen_experts()
            chosen_LN = torch.cat(chosen).cpu().transpose(0, 1).flatten(1)
            self.load_LE.scatter_add_(1, chosen_LN, torch.ones_like(chosen_LN))
            for row, chosen_TLK in zip(rows, chosen, strict=True):
                if row in starts:
                    self.listeners[row](starts[row], chosen_TLK.cpu())
        return logits
