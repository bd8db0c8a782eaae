"""Settings and filters of sampling, against transformers' and against definitions."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dsv3.inference.sampling import (
    Chance,
    Sampled,
    Settings,
    choice_of,
    counted,
    discouraged,
    near_the_likeliest,
    nucleus,
    penalised,
    top_k_logits,
)

few = settings(max_examples=60, deadline=None, derandomize=True)
SEEDS = st.integers(0, 999)
IDS = st.lists(st.integers(0, 11), max_size=9)


def logits_of(seed, *shape):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@few
@given(seed=SEEDS, k=st.integers(1, 15))
def test_top_k(seed, k):
    logits = logits_of(seed, 3, 12)
    assert torch.equal(top_k_logits(logits, k), TopKLogitsWarper(k)(None, logits))


@pytest.mark.parametrize("vocabulary", [12, 600])
@few
@given(seed=SEEDS, top_p=st.floats(0.05, 0.99), sharpness=st.sampled_from([0.5, 1.0, 3.0]))
def test_top_p(vocabulary, seed, top_p, sharpness):
    logits = sharpness * logits_of(seed, 3, vocabulary)
    wanted = TopPLogitsWarper(top_p)(None, logits).softmax(-1)
    torch.testing.assert_close(nucleus(logits.softmax(-1), top_p), wanted)


def test_the_smallest_nucleus_is_the_likeliest_token():
    assert nucleus(torch.tensor([0.2, 0.7, 0.1]), 1e-300).tolist() == [0.0, 1.0, 0.0]


@few
@given(seed=SEEDS, min_p=st.floats(0.01, 1.0))
def test_min_p(seed, min_p):
    logits = logits_of(seed, 3, 12)
    wanted = MinPLogitsWarper(min_p)(None, logits).softmax(-1)
    torch.testing.assert_close(near_the_likeliest(logits.softmax(-1), min_p), wanted)


@few
@given(seed=SEEDS, ids=IDS, penalty=st.floats(0.5, 3.0))
def test_repetition_penalty(seed, ids, penalty):
    logits = logits_of(seed, 12)
    wanted = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids], dtype=torch.int64), logits[None])[0]
    torch.testing.assert_close(discouraged(logits, set(ids), penalty), wanted)


@few
@given(seed=SEEDS, ids=IDS, presence=st.floats(-2, 2), frequency=st.floats(-2, 2))
def test_presence_and_frequency_penalties(seed, ids, presence, frequency):
    logits = logits_of(seed, 12)
    wanted = [
        float(logit) - presence * (token in ids) - frequency * ids.count(token) for token, logit in enumerate(logits)
    ]
    torch.testing.assert_close(counted(logits, ids, presence, frequency), torch.tensor(wanted))


@few
@given(
    seed=SEEDS,
    prompt=IDS,
    text=IDS,
    temperature=st.sampled_from([0.5, 1.0, 1.7]),
    top_k=st.integers(1, 12),
    top_p=st.floats(0.1, 0.99),
    min_p=st.floats(0.01, 0.5),
    penalty=st.sampled_from([0.8, 1.3]),
)
def test_all_together_in_the_order_of_transformers(seed, prompt, text, temperature, top_k, top_p, min_p, penalty):
    chosen = Settings(
        max_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty
    )
    theirs = LogitsProcessorList(
        [
            RepetitionPenaltyLogitsProcessor(penalty),
            TemperatureLogitsWarper(temperature),
            TopKLogitsWarper(top_k),
            TopPLogitsWarper(top_p),
            MinPLogitsWarper(min_p),
        ]
    )
    logits = logits_of(seed, 12)
    wanted = theirs(torch.tensor([prompt + text], dtype=torch.int64), logits[None])[0].softmax(-1)
    ours = choice_of(chosen)
    assert isinstance(ours, Sampled)
    found = ours.distribution(penalised(logits, chosen, prompt, text))
    torch.testing.assert_close(found, wanted)


def test_without_filters_the_distribution_is_the_softmax_to_the_bit():
    logits = logits_of(0, 4, 50)
    found = Sampled(temperature=0.7, chance=Chance(None)).distribution(logits)
    assert torch.equal(found, (logits / 0.7).softmax(-1))
    assert torch.equal(penalised(logits[0], Settings(max_tokens=1), [1], [2]), logits[0])


@pytest.mark.parametrize(
    ("name", "values", "range_"),
    [
        ("max_tokens", [0, -1], "at least 1"),
        ("temperature", [-0.1, math.nan, math.inf], "at least 0"),
        ("top_p", [0.0, 1.01, math.nan], "above 0 and at most 1"),
        ("top_k", [-1], "at least 0"),
        ("min_p", [-0.1, 1.1, math.nan], "from 0 to 1"),
        ("repetition_penalty", [0.0, -1.0, math.nan, math.inf], "above 0"),
        ("presence_penalty", [math.nan, math.inf], "finite"),
        ("frequency_penalty", [math.nan, -math.inf], "finite"),
        ("stop", [("a", "")], "not empty"),
        ("seed", [2**70, 2**64, -(2**63) - 1], r"from -2\*\*63 to 2\*\*64 - 1"),
        ("drafts", [-1], "at least 0"),
    ],
)
def test_settings_out_of_range_are_named(name, values, range_):
    for value in values:
        with pytest.raises(ValueError, match=rf"^{name}=.*: must be .*{range_}") as error:
            Settings(**{"max_tokens": 1, name: value})
        assert str(value) in str(error.value)


@pytest.mark.parametrize("seed", [-(2**63), 0, 2**64 - 1])
def test_every_seed_in_range_is_one(seed):
    assert choice_of(Settings(max_tokens=1, temperature=1.0, seed=seed)).verify(torch.zeros(1, 9), [])[0] == 0
