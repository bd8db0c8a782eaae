"""Choosing tokens: the cut distribution by its definition, drafts verified with exactly the model's distribution."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.inference.sampling import Chance, Greedy, Sampled, Settings, choice_of
from tests.chances import every_outcome

few = settings(max_examples=30, deadline=None, derandomize=True)


def logits_of(seed, *shape):
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(
    seed=st.integers(0, 99), temperature=st.sampled_from([0.3, 1.0, 2.0]), top_p=st.sampled_from([0.1, 0.6, 0.95, 1])
)
@few
def test_distribution_by_its_definition(seed, temperature, top_p):
    """The smallest set of likeliest tokens that holds top_p, in proportion."""
    logits = logits_of(seed, 7)
    found = Sampled(temperature=temperature, top_p=top_p, chance=Chance(None)).distribution(logits)
    p = (logits.double() / temperature).softmax(-1)
    sets = [p.topk(n).indices for n in range(1, 8)]
    smallest = next(chosen for chosen in sets if p[chosen].sum() >= top_p - 1e-9)
    expected = torch.zeros_like(p)
    expected[smallest] = p[smallest] / p[smallest].sum()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("top_p", [1.0, 0.7])
@pytest.mark.parametrize("drafts", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_verified_drafts_have_the_models_distribution(seed, drafts, top_p):
    """Every way that chance can take, weighed: the tokens that come out are distributed as the model alone would.

    p and q depend on the position only, so that the wanted probability of a text is a product of single ones.
    """
    vocabulary = 3
    p_logits, q_logits = logits_of(seed, drafts + 1, vocabulary), logits_of(seed + 50, drafts, vocabulary)

    def texts(chance):
        sampled = Sampled(temperature=1.0, top_p=top_p, chance=chance)
        proposed = [sampled.draft(q_logits[j]) for j in range(drafts)]
        kept, token = sampled.verify(p_logits, proposed)
        text = [*proposed[:kept], token]
        for j in range(len(text), drafts + 1):
            text.append(sampled.verify(p_logits[j : j + 1], [])[1])
        return tuple(text)

    found = every_outcome(texts)
    p = Sampled(temperature=1.0, top_p=top_p, chance=Chance(None)).distribution(p_logits.double())
    for text in itertools.product(range(vocabulary), repeat=drafts + 1):
        wanted = torch.stack([p[j, token] for j, token in enumerate(text)]).prod().item()
        assert found.get(text, 0.0) == pytest.approx(wanted, abs=1e-6)
    assert sum(found.values()) == pytest.approx(1, abs=1e-6)


def test_greedy_keeps_what_agrees():
    logits = torch.eye(4)[[2, 0, 3]]
    assert Greedy().draft(logits[0]) == 2
    assert Greedy().verify(logits, [2, 0]) == (2, 3)
    assert Greedy().verify(logits, [2, 1]) == (1, 0)
    assert Greedy().verify(logits, [1, 0]) == (0, 2)
    assert Greedy().verify(logits[:1], []) == (0, 2)


def test_choices_by_temperature():
    assert isinstance(choice_of(Settings(max_tokens=1, top_p=0.5)), Greedy)
    sampled = [Settings(max_tokens=1, temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    drawn = [choice_of(settings).verify(torch.zeros(1, 50), [])[1] for settings in sampled]
    assert drawn[0] == drawn[1] != drawn[2]
