"""Load of every expert by domain, layer x expert x domain (report, section 4.5.3).

    relative load = (routed tokens of the domain that chose the expert) / (the mean of that over experts)

1 everywhere: experts do not specialise.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv3.contracts import MicroBatch, Routing


class ExpertLoad:
    """Counts the routings of batches; a `RoutingObserver`. Padding is no load."""

    def __init__(self, domains: Sequence[str]) -> None:
        self.domains = list(domains)
        self.counts: dict[str, Tensor] = {}  # int64 [domains, experts] by MoE layer

    def observe(self, micro: MicroBatch, routings: dict[str, Routing]) -> None:
        real_N = micro.document_ids_BT.flatten() > 0
        domains_N = micro.domains_BT.flatten()[real_N]
        for layer, routing in routings.items():
            n_experts = routing.affinities_NE.shape[1]
            cells = domains_N.unsqueeze(1) * n_experts + routing.experts_NK[real_N]
            counts = torch.bincount(cells.flatten(), minlength=len(self.domains) * n_experts)
            self.counts[layer] = self.counts.get(layer, 0) + counts.view(len(self.domains), n_experts)

    def relative(self) -> dict[str, dict[str, list[float]]]:
        """By layer, by domain, for each expert; domains without tokens are left out."""
        return {
            layer: {
                domain: (of_domain / of_domain.double().mean()).tolist()
                for domain, of_domain in zip(self.domains, counts, strict=True)
                if of_domain.any()
            }
            for layer, counts in self.counts.items()
        }
