"""The figures of a layer's routing against loops over its tokens."""

import math
from collections import Counter
from itertools import product

import pytest
import torch

from dsv3.contracts import Routing
from dsv3.model.load import max_violation
from dsv3.monitoring.alerts import changes, condition
from dsv3.monitoring.routing_statistics import RoutingStatistics, load_entropy

E, K, G, X, N = 8, 2, 4, 3, 40


def routing_of(seed: int, n: int = N) -> tuple[Routing, torch.Tensor]:
    """Random affinities, the top K of affinity + bias among the experts of the two groups with the highest sums."""
    generator = torch.Generator().manual_seed(seed)
    affinities_NE = torch.rand(n, E, generator=generator)
    bias_E = torch.rand(E, generator=generator) - 0.5
    scores = (affinities_NE + bias_E).unflatten(1, (G, -1))
    kept = scores.sum(2).topk(2).indices
    allowed = torch.zeros(n, G, dtype=torch.bool).scatter_(1, kept, True).unsqueeze(2)
    experts_NK = scores.masked_fill(~allowed, -math.inf).flatten(1).topk(K).indices
    gates_NK = affinities_NE.gather(1, experts_NK)
    return Routing(experts_NK, gates_NK / gates_NK.sum(1, keepdim=True) * 2.5, affinities_NE), bias_E


def statistics() -> RoutingStatistics:
    return RoutingStatistics(n_experts=E, top_k=K, n_groups=G, n_domains=X)


@pytest.fixture
def observed() -> tuple[RoutingStatistics, list[tuple[Routing, torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """Two micro-batches, with padding."""
    metric, seen = statistics(), []
    for seed in (1, 2):
        routing, bias_E = routing_of(seed)
        generator = torch.Generator().manual_seed(seed)
        domains_N = torch.randint(0, X, (N,), generator=generator)
        real_N = torch.rand(N, generator=generator) > 0.2
        metric.update(routing, bias_E, domains_N, real_N)
        seen.append((routing, bias_E, domains_N, real_N))
    return metric, seen


def test_figures_equal_those_counted_token_by_token(observed: tuple) -> None:
    metric, seen = observed
    load, by_domain, pairs, gates, nodes = Counter(), Counter(), Counter(), Counter(), Counter()
    margins, entropies, violations = [], [], []
    for routing, bias_E, domains_N, real_N in seen:
        here = Counter()
        for n in real_N.nonzero().flatten().tolist():
            experts = routing.experts_NK[n].tolist()
            here.update(experts)
            by_domain.update((int(domains_N[n]), e) for e in experts)
            pairs.update(product(experts, experts))
            nodes[len({e * G // E for e in experts})] += 1
            for e, gate in zip(experts, routing.gates_NK[n].tolist(), strict=True):
                gates[e] += gate
            scores = (routing.affinities_NE[n] + bias_E).tolist()
            margins.append(min(scores[e] for e in experts) - max(s for e, s in enumerate(scores) if e not in experts))
            shares = routing.gates_NK[n] / routing.gates_NK[n].sum()
            entropies.append(-sum(p * math.log(p) for p in shares.tolist()) / math.log(K))
        load.update(here)
        violations.append(max(here.values()) / (sum(here.values()) / E) - 1)
    figures, tokens = metric.compute(), len(margins)
    assert figures["routed_tokens"] == tokens
    assert figures["load"] == [load[e] for e in range(E)]
    assert figures["domain_load"] == [by_domain[x, e] for x in range(X) for e in range(E)]
    assert metric.pairs_EE.tolist() == [[pairs[a, b] for b in range(E)] for a in range(E)]
    assert figures["gate"] == pytest.approx([gates[e] / load[e] for e in range(E)], rel=1e-5)
    assert figures["nodes"] == pytest.approx(sum(n * count for n, count in nodes.items()) / tokens)
    assert figures["margin"] == pytest.approx(sum(margins) / tokens, rel=1e-4)
    assert figures["group_limited_fraction"] == sum(m < 0 for m in margins) / tokens
    assert 0 < figures["group_limited_fraction"] < 1
    assert figures["gate_entropy"] == pytest.approx(sum(entropies) / tokens, rel=1e-5)
    assert figures["max_vio_micro"] == pytest.approx(sum(violations) / 2)
    assert figures["max_vio_interval"] == pytest.approx(max(load.values()) / (sum(load.values()) / E) - 1)


def test_sums_continue_after_saving_and_loading(observed: tuple) -> None:
    metric, seen = observed
    other = statistics()
    other.load_state_dict(metric.state_dict())
    for each in (metric, other):
        each.update(*seen[0])
        each.add_step(float(max_violation(torch.arange(E))))
        each.add_norms(torch.ones(E).double(), torch.full((E,), 2))
    assert other.compute() == metric.compute()
    assert metric.compute()["output_norm"] == [0.5] * E
    metric.reset()
    assert metric.compute()["load"] == [0] * E


def test_known_loads() -> None:
    assert max_violation(torch.tensor([1, 2, 3, 6])) == 1.0
    assert load_entropy(torch.tensor([5, 5, 5, 5])) == pytest.approx(math.log(4))
    assert load_entropy(torch.tensor([7, 0, 0, 0])) == 0.0
    assert max_violation(torch.zeros(4).long()) == 0.0


def figures_of(load: list[int]) -> dict:
    return {"load": load, "effective_experts": math.exp(load_entropy(torch.tensor(load)))}


def test_dead_expert_and_collapse_are_told_once_and_by_name() -> None:
    healthy = figures_of([100] * 16)
    assert condition(healthy, top_k=2) == {}
    dead = condition(figures_of([100] * 5 + [0] + [100] * 10), top_k=2)
    assert dead == {("dead expert", 5): 0.0}
    (alert,) = changes(5000, "layers.2", 16, set(), dead)
    assert alert.text == "layers.2 expert 5 is dead: 0.00% of the balanced load"
    assert list(changes(6000, "layers.2", 16, set(dead), dead)) == []
    (alert,) = changes(7000, "layers.2", 16, set(dead), {})
    assert (alert.kind, alert.expert) == ("revived expert", 5)
    assert condition(figures_of([100] * 4 + [80] * 4), top_k=6) == {}, "most experts serve each token"
    collapsed = condition(figures_of([800, 790] + [1] * 14), top_k=2)
    assert ("collapse", -1) in collapsed
    assert {kind for kind, _ in collapsed} == {"collapse", "dead expert"}
