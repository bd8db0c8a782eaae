"""Routing statistics of one MoE layer: sums over training tokens, and the metrics computed from them.

Only sums are taken in a step, on the device and without waiting for it; the figures are computed once an interval.
With load_i the number of tokens that chose expert i, E experts, K of them active per token:

    max_vio             MaxVio, max_i load_i / mean load - 1, of a micro-batch, of an optimiser step, of the interval
    load entropy        H(load / sum load) / ln E, 1 when balanced; effective experts = exp(H)
    gate                mean gate of expert i over the tokens that chose it
    gate entropy        mean over tokens of H(gates / their sum) / ln K: 1 where a token weighs its experts alike
    margin              mean of (weakest chosen score - strongest score passed over), scores being affinity + bias;
                        below 0 for a token whose stronger expert stood in a group that the router did not keep
    group_limited_fraction  of tokens with a margin below 0
    nodes               groups ("nodes") that hold a token's experts
    specialisation      relative load of expert i on a domain's tokens (the report's Fig. 9)
"""

import math
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from dsv3.contracts import Routing
from dsv3.model.load import max_violation


class RoutingStatistics(Metric):
    """One MoE layer's sums, added over ranks. Letters beside those of `dsv3.contracts`: X domains, G groups."""

    group_EG: Tensor
    load_XE: Tensor
    pairs_EE: Tensor
    gates_E: Tensor
    gate_entropy: Tensor
    margin: Tensor
    limited: Tensor
    nodes_G: Tensor
    micro_violation: Tensor
    micro_batches: Tensor
    step_violation: Tensor
    steps: Tensor
    norms_E: Tensor
    normed_E: Tensor

    def __init__(self, *, n_experts: int, top_k: int, n_groups: int, n_domains: int, process_group: Any = None) -> None:
        """`n_groups`: nodes that the experts stand on in order, whether or not the router limits a token's nodes.
        `process_group`: the ranks whose sums are added up within `sync_context`; None: all."""
        super().__init__(sync_on_compute=False, process_group=process_group)
        self.n_experts, self.top_k, self.n_groups = n_experts, top_k, n_groups
        integers = {"load_XE": (n_domains, n_experts), "pairs_EE": (n_experts, n_experts), "nodes_G": (n_groups,)}
        integers |= {"limited": (), "micro_batches": (), "steps": (), "normed_E": (n_experts,)}
        reals = {"gates_E": (n_experts,), "norms_E": (n_experts,), "gate_entropy": (), "margin": ()}
        reals |= {"micro_violation": (), "step_violation": ()}
        for shapes, dtype in ((integers, torch.int64), (reals, torch.float64)):
            for name, shape in shapes.items():
                self.add_state(name, torch.zeros(shape, dtype=dtype), dist_reduce_fx="sum", persistent=True)
        group_E = torch.arange(n_experts) * n_groups // max(n_experts, 1)
        self.register_buffer("group_EG", torch.nn.functional.one_hot(group_E, n_groups).float(), persistent=False)

    @torch.no_grad()
    def update(self, routing: Routing, bias_E: Tensor, domains_N: Tensor, real_N: Tensor) -> None:
        """Add one micro-batch. `real_N`: False for padding; `bias_E`: what the router selected with."""
        experts_NK, gates_NK, affinities_NE = routing
        weight_N1 = real_N.unsqueeze(1).to(affinities_NE.dtype)
        chosen_NE = torch.zeros_like(affinities_NE).scatter_(1, experts_NK, weight_N1.expand(experts_NK.shape))
        domain_NX = torch.zeros(len(domains_N), len(self.load_XE), device=domains_N.device)
        domain_NX.scatter_(1, domains_N.unsqueeze(1), 1.0)
        load_XE = (domain_NX.T @ chosen_NE).long()  # products of zeros and ones: exact below 2^24 tokens
        self.load_XE += load_XE
        self.pairs_EE += (chosen_NE.T @ chosen_NE).long()
        nodes_N = (chosen_NE @ self.group_EG > 0).sum(1)  # 0 for padding
        self.nodes_G.scatter_add_(0, (nodes_N - 1).clamp(min=0), real_N.long())
        self._add_gates(experts_NK, gates_NK * weight_N1)
        self._add_margin(affinities_NE + bias_E, experts_NK, chosen_NE, real_N)
        self.micro_violation += max_violation(load_XE.sum(0))
        self.micro_batches += 1

    def _add_gates(self, experts_NK: Tensor, gates_NK: Tensor) -> None:
        """`gates_NK`: 0 for padding, which then adds nothing."""
        self.gates_E += torch.zeros_like(self.gates_E).index_add_(0, experts_NK.flatten(), gates_NK.flatten().double())
        if self.top_k > 1:
            shares_NK = gates_NK / gates_NK.sum(1, keepdim=True).clamp(min=1e-20)
            self.gate_entropy -= (shares_NK * shares_NK.clamp(min=1e-20).log()).sum(dtype=torch.float64)

    def _add_margin(self, scores_NE: Tensor, experts_NK: Tensor, chosen_NE: Tensor, real_N: Tensor) -> None:
        if self.top_k < self.n_experts:
            passed_over_N = (scores_NE - chosen_NE * 1e9).amax(1)
            margin_N = scores_NE.gather(1, experts_NK).amin(1) - passed_over_N
            self.margin += (margin_N * real_N).sum(dtype=torch.float64)
            self.limited += ((margin_N < 0) & real_N).sum()

    def add_step(self, violation: float) -> None:
        """Add the MaxVio of a whole optimiser step."""
        self.step_violation += violation
        self.steps += 1

    def add_norms(self, norms_E: Tensor, counts_E: Tensor) -> None:
        """Add sums of the L2 norms of expert outputs, and over how many outputs."""
        self.norms_E += norms_E
        self.normed_E += counts_E

    def compute(self) -> dict[str, Any]:
        """The figures as plain numbers and lists; arrays are lists by expert, `domain_load` one of them a domain."""
        load_E = self.load_XE.sum(0)
        tokens = load_E.sum().item() / self.top_k
        entropy = load_entropy(load_E)
        nodes = sum(n * count for n, count in enumerate(self.nodes_G.tolist(), 1)) / max(tokens, 1)
        return {
            "routed_tokens": round(tokens),
            "max_vio_micro": (self.micro_violation / self.micro_batches.clamp(min=1)).item(),
            "max_vio_step": (self.step_violation / self.steps.clamp(min=1)).item(),
            "max_vio_interval": max_violation(load_E).item(),
            "load_entropy": entropy / math.log(self.n_experts) if self.n_experts > 1 else 1.0,
            "effective_experts": math.exp(entropy),
            "gate_entropy": self.gate_entropy.item() / max(tokens, 1) / math.log(max(self.top_k, 2)),
            "margin": self.margin.item() / max(tokens, 1),
            "group_limited_fraction": self.limited.item() / max(tokens, 1),
            "nodes": nodes,
            "load": load_E.tolist(),
            "gate": (self.gates_E / load_E.clamp(min=1)).tolist(),
            "output_norm": (self.norms_E / self.normed_E.clamp(min=1)).tolist(),
            "domain_load": self.load_XE.flatten().tolist(),
        }


def load_entropy(load_E: Tensor) -> float:
    """Entropy of the load's distribution over the experts, in nats."""
    share_E = load_E.double() / load_E.sum().clamp(min=1)
    return -torch.special.xlogy(share_E, share_E).sum().item()
