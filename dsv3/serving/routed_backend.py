"""A backend that notes which experts each token is routed to.

Shape legend: B rows, T positions, L layers with experts, K experts for each token, E experts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dsv3.inference.backend import DecoderBackend
from dsv3.model.decoder import Decoder

OnRouted = Callable[[int, Tensor], None]
"""Is given the first position that was read, and the experts [T, L, K] of it and those after it."""


class RoutedBackend(DecoderBackend):
    """`DecoderBackend`, and the load of all experts of the main model."""

    def __init__(self, model: Decoder) -> None:
        super().__init__(model)
        moes = [(name, moe) for name, moe in model.moe_layers() if name.startswith("layers.")]
        self.layers = [name for name, _ in moes]
        self.listeners: dict[int, OnRouted] = {}  # by row; whoever adds one removes it
        self._latest: dict[str, Tensor] = {}
        self.experts = max((len(moe.balancing.bias) for _, moe in moes), default=0)  # of a layer
        self.load_LE = torch.zeros(len(moes), self.experts, dtype=torch.int64, device=model.device)  # tokens of each
        for name, moe in moes:
            moe.register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def note(module: nn.Module, arguments: Any, output: Any) -> None:
            self._latest[name] = output[1].experts_NK

        return note

    def read(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], wanted: Sequence[int]) -> list[Tensor]:
        starts = [self.caches.lengths[row] for row in rows]
        logits = super().read(rows, tokens, wanted)
        if self.layers:
            layers_LNK = torch.stack([self._latest[name] for name in self.layers])
            routed_BTLK = layers_LNK.unflatten(1, (len(rows), -1)).permute(1, 2, 0, 3)
            real_NLK = torch.cat([routed_TLK[: len(ids)] for routed_TLK, ids in zip(routed_BTLK, tokens, strict=True)])
            chosen_LN = real_NLK.transpose(0, 1).flatten(1)
            self.load_LE.scatter_add_(1, chosen_LN, torch.ones_like(chosen_LN))
            for row, start, ids, routed_TLK in zip(rows, starts, tokens, routed_BTLK, strict=True):
                if row in self.listeners:
                    self.listeners[row](start, routed_TLK[: len(ids)].cpu())
        return logits
