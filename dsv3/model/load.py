"""Expert load: counts of real tokens by expert, and MaxVio. Nothing here waits for the device."""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dsv3.contracts import MicroBatch, Routing


def real_tokens(micro: MicroBatch, routing: Routing) -> Tensor:
    """True where a routed position is not padding, [B, S]; MTP routes the last S < T positions of each row."""
    rows = micro.tokens_BT.shape[0]
    return micro.document_ids_BT[:, -(routing.experts_NK.shape[0] // rows) :] > 0


def count_experts(experts_NK: Tensor, real_N: Tensor, n_experts: int) -> Tensor:
    """How many real tokens chose each expert, int64 [E]."""
    counts_E = torch.zeros(n_experts, dtype=torch.int64, device=experts_NK.device)
    return counts_E.scatter_add_(0, experts_NK.flatten(), real_N.long().unsqueeze(1).expand_as(experts_NK).flatten())


class Loads(NamedTuple):
    """The load of all MoE layers in one int64 tensor, so that one reduction and one transfer serve them all."""

    layers: tuple[str, ...]
    sizes: tuple[int, ...]  # experts of each layer
    counts: Tensor

    @classmethod
    def zeros(cls, n_experts: Mapping[str, int], device: torch.device) -> "Loads":
        """No load yet. `n_experts`: by MoE layer."""
        sizes = tuple(n_experts.values())
        return cls(tuple(n_experts), sizes, torch.zeros(sum(sizes), dtype=torch.int64, device=device))

    def add(self, micro: MicroBatch, routings: Mapping[str, Routing]) -> None:
        """Count one micro-batch, in place. Padding is no load."""
        by_layer = self.by_layer()
        for layer, routing in routings.items():
            counts_E = by_layer[layer]
            counts_E += count_experts(routing.experts_NK, real_tokens(micro, routing).flatten(), len(counts_E))

    def by_layer(self) -> dict[str, Tensor]:
        """Views int64 [E] of the counts."""
        return dict(zip(self.layers, self.counts.split(self.sizes), strict=True))


def max_violation(load_E: Tensor) -> Tensor:
    """MaxVio (arXiv 2408.15664): largest load / mean load - 1, a float64 scalar; 0 where nothing was routed."""
    mean = load_E.double().mean()
    return torch.where(mean > 0, load_E.max() / mean.clamp(min=torch.finfo(torch.float64).tiny) - 1, 0.0)
