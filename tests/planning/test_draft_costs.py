"""Cost and gain of drafts: counts of a built model, closed forms, and texts that draft only as long as it pays."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3.inference.backend import DecoderBackend
from dsv3.inference.engine import Engine, complete
from dsv3.inference.sampling import Settings
from dsv3.model.layers import cached_weight_casts
from dsv3.planning.draft_costs import EAGER, LEAST_GAIN, USUAL, DraftCosts, Weights, draft_costs, read_costs
from tests.parity.test_decoder import SHAPES
from tests.parity.twins import configured, random_model

sizes = st.integers(1, 10**9)
weights = st.builds(Weights, st.integers(1, 61), sizes, sizes, st.floats(0.01, 1))


def test_counts_are_those_of_a_built_model():
    for depth in (1, 2):
        model = random_model(configured(f"mtp.depth={depth}", **SHAPES | {"n_layers": 3}), seed=1)
        named = {name: p.numel() for name, p in model.named_parameters()}
        routed = {name: size for name, size in named.items() if ".experts." in name}
        costs = draft_costs(model, EAGER)
        head = named["lm_head.weight"]
        assert costs.model.layers == 3
        assert costs.model.routed == sum(size for name, size in routed.items() if name.startswith("layers."))
        in_layers = sum(size for name, size in named.items() if name.startswith("layers."))
        assert costs.model.dense + costs.model.routed == in_layers + head
        in_modules = sum(size for name, size in named.items() if name.startswith("mtp."))
        assert depth * (costs.module.dense + costs.module.routed - head) == in_modules
        assert costs.model.share == costs.module.share == SHAPES["top_k"] / SHAPES["n_routed_experts"]
        assert read_costs(costs.written(), EAGER) == costs
    assert draft_costs(random_model(configured("mtp=none", **SHAPES), seed=1), EAGER) is None
    assert read_costs(None, EAGER) is None


@given(layers=st.integers(1, 61), kept=st.floats(0, 1))
def test_where_calls_are_all_a_draft_costs_one_layer_of_them(layers, kept):
    costs = DraftCosts(Weights(layers, 1, 1, 0.1), Weights(1, 1, 1, 0.1), overhead=1e15)
    assert costs.gain(kept) == pytest.approx((1 + kept) * layers / (1.1 * layers + 1))


@given(model=weights, module=weights, kept=st.floats(0, 0.9), rows=st.integers(1, 64))
def test_more_rows_or_fewer_kept_never_gain_more(model, module, kept, rows):
    costs = DraftCosts(model, module, 0.0)
    assert costs.gain(kept + 0.1, rows) > costs.gain(kept, rows)
    read_once = DraftCosts(model._replace(routed=0), module._replace(routed=0), 0.0)  # what a further token shares
    assert read_once.gain(kept, rows + 1) <= read_once.gain(kept, rows)


def test_a_text_says_itself_whether_they_pay():
    costs = DraftCosts(Weights(8, 1, 1, 0.1), Weights(1, 1, 1, 0.1), overhead=1e15)
    least = LEAST_GAIN * (1.1 * 8 + 1) / 8 - 1
    assert costs.pay(0, 0)
    assert not costs.pay(1000, int(1000 * least) - 10)
    assert costs.pay(1000, int(1000 * least) + 10)
    assert 0 < least < USUAL


def test_drafts_end_where_none_is_kept_and_the_text_stays():
    """Random weights keep almost none of a large vocabulary; the calls of operations make two layers cost three."""
    model = random_model(configured(**SHAPES | {"n_layers": 6, "vocab_size": 60}), seed=3)
    prompts = [torch.randint(60, (5 + i,)).tolist() for i in range(3)]
    with cached_weight_casts(model):
        backend = DecoderBackend(model)
        engine = Engine(backend)
        rows = [engine.add(prompt, Settings(max_tokens=40, drafts=None)) for prompt in prompts]
        texts = {row: [] for row in rows}
        while engine.rows:
            for event in engine.step():
                texts[event.row] += event.ids
        plain = complete(DecoderBackend(model), prompts, [Settings(max_tokens=40)] * 3, decode=str, at_once=8)
    assert list(texts.values()) == [text.ids for text in plain]
    assert 3 <= engine.speculation.made < 75, "some are made, and then no more"


def test_a_sampled_text_depends_on_no_row_beside_it():
    model = random_model(configured(**SHAPES | {"n_layers": 6}), seed=3)
    settings = Settings(max_tokens=30, temperature=1.0, seed=5, drafts=None)
    costs = draft_costs(model, EAGER)
    assert costs.pay(0, 0)
    with cached_weight_casts(model):
        backend = DecoderBackend(model)
        large = costs.model._replace(dense=10**8), costs.module._replace(dense=12 * 10**6)
        backend.draft_costs = DraftCosts(*large, costs.overhead)
        assert backend.draft_costs.pay(0, 0)
        alone = complete(backend, [[1, 2, 3]], [settings], decode=str, at_once=8)[0]
        others = [replace(settings, seed=seed) for seed in range(7)]
        among = complete(backend, [[1, 2, 3]] * 8, [settings, *others], decode=str, at_once=8)[0]
    assert not backend.draft_costs.pay(0, 0, rows=8), "greedy rows would have none"
    assert alone.ids == among.ids


def test_a_model_without_mtp_writes_without_drafts():
    model = random_model(configured("mtp=none", **SHAPES), seed=3)
    with cached_weight_casts(model):
        text = complete(DecoderBackend(model), [[1]], [Settings(max_tokens=3, drafts=None)], decode=str, at_once=8)[0]
    assert len(text.ids) == 3
