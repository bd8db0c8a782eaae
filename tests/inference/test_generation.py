"""Speculative decoding gives the text of plain decoding; its drafts are those of the whole rows; weights are held."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.inference.generation import generate
from dsv3.inference.sampling import Greedy, Sampled, Settings
from dsv3.inference.speculation import Speculation
from dsv3.model.layers import cached_weight_casts
from tests.chances import every_outcome
from tests.parity.test_decoder import SHAPES
from tests.parity.twins import configured, copied, distance, micro_batch, random_model

few = settings(max_examples=8, deadline=None, derandomize=True)
OPTIONS = [
    (),
    ("mtp.depth=2", "mtp.concat=hidden_embedding", "mtp.after_final_norm=false"),
    ("mtp.depth=3", "attention=gqa"),
    ("mtp.depth=2", "attention.decode=naive", "router=hash"),
    ("memory=ngram", "memory.rows=97"),
]
options = pytest.mark.parametrize("chosen", OPTIONS, ids=" ".join)
VOCABULARY = 4  # so few that drafts are often right by chance


@copied
def model_of(*chosen, seed=1, vocabulary=VOCABULARY, layers=2, sharp=0.2):
    """`sharp` scales the head: below 1, drawn tokens and drafts agree now and then, and now and then not."""
    model = random_model(configured(*chosen, **SHAPES | {"vocab_size": vocabulary, "n_layers": layers}), seed=seed)
    with torch.no_grad():
        model.lm_head.weight.mul_(sharp)
    return model


def prompt_of(seed, length):
    return torch.randint(VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@options
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@given(seed=st.integers(0, 99), length=st.integers(1, 6), drafts=st.integers(1, 4), tokens=st.integers(1, 20))
@few
def test_greedy_text_is_the_same(chosen, precision, seed, length, drafts, tokens):
    model, prompt = model_of(f"precision={precision}", *chosen, seed=seed % 3), prompt_of(seed, length)
    speculation = Speculation()
    expected = list(generate(model, prompt, Settings(max_tokens=tokens)))
    assert (
        list(generate(model, prompt, Settings(max_tokens=tokens, drafts=drafts), speculation=speculation)) == expected
    )
    assert len(expected) == tokens == speculation.passes + speculation.kept


@options
def test_some_drafts_are_kept_and_some_are_not(chosen):
    """Else the test above would see one side only."""
    speculation = Speculation()
    for seed in range(6):
        model = model_of(*chosen, seed=seed % 3)
        list(generate(model, prompt_of(seed, 4), Settings(max_tokens=20, drafts=3), speculation=speculation))
    assert 0 < speculation.kept < speculation.made
    assert speculation.acceptance == speculation.kept / speculation.made


class Watched(Greedy):
    """Greedy, keeping what was seen of each pass: the drafts' logits, the drafts, and how many of them were kept."""

    def __init__(self):
        self.logits, self.passes = [], []

    def draft(self, logits_V):
        self.logits.append(logits_V)
        return super().draft(logits_V)

    def verify(self, logits_SV, drafts):
        kept, token = super().verify(logits_SV, drafts)
        self.passes.append((list(self.logits), list(drafts), kept, token))
        self.logits.clear()
        return kept, token


@options
@torch.no_grad()
def test_drafts_are_those_of_whole_rows(chosen):
    """Whatever was kept or rewound before: module k's logits after these tokens, without any cache."""
    kept_counts = set()
    for seed in range(4):
        model, tokens, watched = model_of(*chosen, seed=seed), prompt_of(seed, 3), Watched()
        list(generate(model, tokens, Settings(max_tokens=16, drafts=4), choice=watched))
        for logits, drafts, kept, token in watched.passes:
            for k, found in enumerate(logits[: model.mtp.depth], start=1):
                ids = torch.tensor([[*tokens, *drafts[: k - 1]]])
                hidden_BSD = model(micro_batch(ids, ids), with_mtp=True).predictions[k - 1].hidden_BSD
                assert distance(found, model.logits(hidden_BSD[0, -1])) <= 1e-4
            tokens = [*tokens, *drafts[:kept], token]
            kept_counts.add(kept)
    assert {0, 1} <= kept_counts


@pytest.mark.parametrize("chosen", [(), ("mtp.depth=2",)], ids=" ".join)
def test_sampled_texts_have_the_models_distribution(chosen):
    """All texts of three tokens, by every way that chance can take, against products of the model's probabilities."""
    model, prompt, vocabulary = model_of(*chosen, vocabulary=3, layers=1, sharp=0.5), [0, 2], 3

    def text(chance):
        sampled = Sampled(temperature=0.8, top_p=0.9, chance=chance)
        return tuple(generate(model, prompt, Settings(max_tokens=3, drafts=2), choice=sampled))

    found, sampled = every_outcome(text), Sampled(temperature=0.8, top_p=0.9, chance=None)
    for wanted in itertools.product(range(vocabulary), repeat=3):
        ids = torch.tensor([[*prompt, *wanted]])
        with torch.no_grad():
            logits_TV = model.logits(model(micro_batch(ids, ids), with_mtp=False).hidden_BTD[0])
        p_TV = sampled.distribution(logits_TV.double())
        probability = torch.stack([p_TV[len(prompt) - 1 + j, token] for j, token in enumerate(wanted)]).prod().item()
        assert found.get(wanted, 0.0) == pytest.approx(probability, abs=1e-5)


@options
def test_the_end_of_text_among_drafts(chosen):
    model, prompt = model_of(*chosen), prompt_of(0, 4)
    whole = list(generate(model, prompt, Settings(max_tokens=20)))
    for stop in set(whole):
        expected = whole[: whole.index(stop)]
        assert list(generate(model, prompt, Settings(max_tokens=20, eos=(stop,)))) == expected
        found = generate(model, prompt, Settings(max_tokens=20, eos=(stop,), drafts=3))
        assert list(found) == expected


def test_what_cannot_be_generated():
    model = model_of("mtp=none")
    with pytest.raises(ValueError, match="an empty prompt"):
        generate(model, [], Settings(max_tokens=3))
    with pytest.raises(ValueError, match="this one has none"):
        generate(model, [1], Settings(max_tokens=3, drafts=2))


def held(model):
    return [module.held for module in model.modules() if getattr(module, "held", None) is not None]


def test_weights_are_held_for_one_text_only():
    """Casts are made once, those of an outer block outlive an inner one, and an abandoned text gives its own back."""
    model = model_of("precision=bf16")
    text = generate(model, [1, 2], Settings(max_tokens=9))
    assert not held(model)
    next(text)
    casts = held(model)
    assert casts
    next(text)
    assert all(one is other for one, other in zip(casts, held(model), strict=True))
    text.close()
    assert not held(model)
    with cached_weight_casts(model):
        list(generate(model, [1, 2], Settings(max_tokens=2)))
        assert held(model)
    assert not held(model)


def test_training_after_generation_is_as_without_it():
    """Weights that changed between two texts count, and gradients still reach them."""
    gradients, texts = [], []
    for generates in (True, False):
        model, ids = model_of("precision=bf16"), torch.tensor([[1, 2, 3, 0, 1]])
        if generates:
            list(generate(model, [1, 2], Settings(max_tokens=4, drafts=2)))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.25)
        model(micro_batch(ids, ids), with_mtp=True).hidden_BTD.float().square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        texts.append(list(generate(model, [1, 2], Settings(max_tokens=8))))
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))
    assert texts[0] == texts[1]
