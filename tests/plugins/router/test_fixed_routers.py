"""Hash and random routing: uniform, repeatable, and different from layer to layer."""

import torch

from plugins.router.fixed import HashRouter, RandomRouter, mix

X = torch.zeros(20_000, 4)
BIAS = torch.zeros(16)


def loads(routing):
    return torch.bincount(routing.experts_NK.flatten(), minlength=16).double()


def test_mix_is_a_bijection_on_a_range():
    mixed = mix(torch.arange(200_000))
    assert len(mixed.unique()) == 200_000
    assert mixed.min() >= 0
    assert mixed.max() < 2**32


def test_mix_changes_half_of_the_bits():
    x = torch.arange(4000)
    for bit in range(20):
        changed = mix(x) ^ mix(x ^ (1 << bit))
        share = sum(((changed >> b) & 1).double().mean() for b in range(32)) / 32
        assert abs(share - 0.5) < 0.02


def test_hash_router_sends_a_token_id_to_the_same_experts():
    router = HashRouter(n_experts=16, top_k=3, route_scale=2.5)
    tokens = torch.arange(20_000) % 500
    routing = router(X, BIAS, tokens)
    assert torch.equal(routing.experts_NK, routing.experts_NK[:500].repeat(40, 1))
    assert torch.equal(routing.gates_NK, torch.full((20_000, 3), 2.5 / 3))


def test_loads_are_uniform_within_chance():
    """Chi-squared of 16 loads: mean 15 * (1 - share chosen), and far above it only if some expert is preferred."""
    for router, tokens in (
        (HashRouter(n_experts=16, top_k=4, route_scale=1.0), torch.arange(20_000)),
        (RandomRouter(n_experts=16, top_k=4, route_scale=1.0), torch.zeros(20_000, dtype=torch.int64)),
    ):
        for salt in range(5):
            router.salt.fill_(salt)
            counts = loads(router(X, BIAS, tokens))
            expected = 20_000 * 4 / 16
            assert ((counts - expected) ** 2 / expected).sum() < 40


def test_pairs_of_experts_are_independent():
    router = RandomRouter(n_experts=16, top_k=2, route_scale=1.0)
    router.salt.fill_(11)
    experts = router(X, BIAS, torch.zeros(20_000, dtype=torch.int64)).experts_NK
    pairs = torch.bincount(experts[:, 0] * 16 + experts[:, 1], minlength=256).double()
    pairs = pairs[torch.tensor([i // 16 != i % 16 for i in range(256)])]
    expected = 20_000 / 240
    assert ((pairs - expected) ** 2 / expected).sum() < 239 + 5 * (2 * 239) ** 0.5


def test_random_router_varies_with_the_row_and_repeats_itself():
    router = RandomRouter(n_experts=16, top_k=2, route_scale=1.0)
    tokens = torch.full((20_000,), 7)
    first = router(X, BIAS, tokens)
    assert len(first.experts_NK.unique(dim=0)) == 240
    torch.rand(5)
    assert torch.equal(router(X, BIAS, tokens).experts_NK, first.experts_NK)


def test_layers_differ_and_the_salt_is_saved():
    torch.manual_seed(0)
    one, two = (HashRouter(n_experts=16, top_k=2, route_scale=1.0) for _ in range(2))
    tokens = torch.arange(20_000)
    before = two(X, BIAS, tokens).experts_NK
    assert not torch.equal(one(X, BIAS, tokens).experts_NK, before)
    one.load_state_dict(two.state_dict())
    assert torch.equal(one(X, BIAS, tokens).experts_NK, before)


def test_affinities_show_the_choice():
    routing = HashRouter(n_experts=16, top_k=3, route_scale=1.0)(X, BIAS, torch.arange(20_000))
    assert torch.equal(routing.affinities_NE.sum(0).double(), loads(routing))
