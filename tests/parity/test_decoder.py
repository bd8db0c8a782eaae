"""The whole model: causality, documents, rows, caches; for every attention and router that fits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.contracts import MicroBatch
from dsv3.inference.generation import generate
from dsv3.inference.sampling import Settings
from tests.parity.twins import configured, copied, distance, micro_batch, random_model

few = settings(max_examples=8, deadline=None, derandomize=True)
SHAPES = {
    "vocab_size": 50,
    "dim": 32,
    "n_layers": 2,
    "inter_dim": 24,
    "moe_inter_dim": 8,
    "n_routed_experts": 8,
    "top_k": 2,
    "topk_groups": 2,
    "n_heads": 2,
    "n_kv_heads": 1,
    "head_dim": 8,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 8,
}
ROUNDING = 1e-5
OPTIONS = [
    ("attention=mla",),
    ("attention=mla", "attention.decode=naive"),
    ("attention=gqa",),
    ("router=softmax_group_limited",),
    ("router=hash",),
    ("memory=ngram", "memory.rows=97"),
]
options = pytest.mark.parametrize("chosen", OPTIONS, ids=" ".join)


@copied
def model_of(chosen, isolate=False, seed=1):
    config = configured(*chosen, **SHAPES)
    config.data.isolate_documents = isolate
    return random_model(config, seed=seed)


def tokens_of(seed, rows=2, length=12):
    return torch.randint(50, (rows, length), generator=torch.Generator().manual_seed(seed))


def states(model, tokens, **fields):
    with torch.no_grad():
        return model(micro_batch(tokens, tokens)._replace(**fields), with_mtp=True)


@options
@given(seed=st.integers(0, 99), t=st.integers(1, 11))
@few
def test_causality(chosen, seed, t):
    """Nothing before position t depends on what stands at t; MTP's position i sees one token more."""
    model, tokens = model_of(chosen), tokens_of(seed)
    other = tokens.clone()
    other[:, t:] = (other[:, t:] + 1 + tokens_of(seed + 1)[:, t:] % 49) % 50
    before, after = states(model, tokens), states(model, other)
    assert distance(after.hidden_BTD[:, :t], before.hidden_BTD[:, :t]) <= ROUNDING
    assert distance(after.hidden_BTD[:, t], before.hidden_BTD[:, t]) > ROUNDING
    if t > 1:
        one, two = (output.predictions[0].hidden_BSD[:, : t - 1] for output in (after, before))
        assert distance(one, two) <= ROUNDING
    assert distance(*(o.predictions[0].hidden_BSD[:, t - 1] for o in (after, before))) > ROUNDING


@options
@given(seed=st.integers(0, 99), cut=st.integers(1, 11))
@few
def test_isolated_documents_equal_separate_ones(chosen, seed, cut):
    model, tokens = model_of(chosen, isolate=True), tokens_of(seed)
    place = torch.arange(12).expand(2, -1)
    ids, positions = 1 + (place >= cut).long(), torch.where(place >= cut, place - cut, place)
    packed = states(model, tokens, document_ids_BT=ids, positions_BT=positions)
    for part in (slice(0, cut), slice(cut, 12)):
        alone = states(model, tokens[:, part]) if part.stop - part.start > 1 else None
        if alone is not None:
            assert distance(packed.hidden_BTD[:, part], alone.hidden_BTD) <= ROUNDING
            inside = slice(part.start, part.stop - 1)
            found = packed.predictions[0].hidden_BSD[:, inside]
            assert distance(found, alone.predictions[0].hidden_BSD) <= ROUNDING


def test_documents_are_joined_unless_isolated():
    model, tokens = model_of(("attention=mla",)), tokens_of(0)
    ids = 1 + (torch.arange(12) >= 5).long().expand(2, -1)
    assert torch.equal(states(model, tokens, document_ids_BT=ids).hidden_BTD, states(model, tokens).hidden_BTD)


@options
@given(seed=st.integers(0, 99), chunks=st.lists(st.integers(1, 5), min_size=1, max_size=6))
@few
def test_cache_equals_no_cache(chosen, seed, chunks):
    model, tokens = model_of(chosen), tokens_of(seed, length=sum(chunks))
    with torch.no_grad():
        caches = model.new_caches(range(2))
        parts = [model.decode(part, caches) for part in tokens.split(chunks, dim=1)]
        whole = model.lm_head(model(micro_batch(tokens, tokens), with_mtp=False).hidden_BTD)
    assert distance(torch.cat(parts, 1), whole) <= ROUNDING


@options
def test_rewound_caches_forget(chosen):
    model, tokens = model_of(chosen), tokens_of(0)
    with torch.no_grad():
        caches = model.new_caches(range(2))
        expected = torch.cat([model.decode(tokens[:, :5], caches), model.decode(tokens[:, 5:], caches)], 1)
        for row in range(2):
            caches.rewind(row, 5)
        model.decode(tokens[:, :4], caches)
        for row in range(2):
            caches.rewind(row, 5)
        assert torch.equal(model.decode(tokens[:, 5:], caches), expected[:, 5:])


@options
@given(seed=st.integers(0, 99), lengths=st.lists(st.integers(0, 90), min_size=2, max_size=4), new=st.integers(1, 3))
@few
def test_rows_of_unequal_length_decode_as_each_alone(chosen, seed, lengths, new):
    """Also where one has ended in another block of the cache, or has just begun; and they grow no further."""
    model, rows = model_of(chosen), range(len(lengths))
    tokens = tokens_of(seed, rows=len(lengths), length=max(lengths) + new)
    with torch.no_grad():
        caches = model.new_caches(rows)
        for row, length in enumerate(lengths):
            if length:
                model.decode(tokens[row : row + 1, :length], caches.select([row]))
        following = torch.stack([tokens[row, length : length + new] for row, length in enumerate(lengths)])
        together = model.decode(following, caches)
        for row, length in enumerate(lengths):
            ids = tokens[row : row + 1, : length + new]
            alone = model.lm_head(model(micro_batch(ids, ids), with_mtp=False).hidden_BTD)
            assert distance(together[row], alone[0, length:]) <= ROUNDING
    assert caches.lengths == {row: length + new for row, length in enumerate(lengths)}


@options
def test_a_row_copies_another_and_goes_its_own_way(chosen):
    model, tokens = model_of(chosen), tokens_of(0, rows=2)
    tokens[1, :6] = tokens[0, :6]
    with torch.no_grad():
        caches = model.new_caches([7])
        model.decode(tokens[:1], caches)
        caches.copy(7, 3, 6)
        copied = model.decode(tokens[1:, 6:], caches.select([3]))
        alone = model.decode(tokens[1:], model.new_caches([0]))
        assert distance(copied, alone[:, 6:]) <= ROUNDING
        assert caches.lengths == {7: 12, 3: 12}
        again = model.decode(tokens[:1, :1], caches.select([7]))
        caches.rewind(7, 12)
        caches.drop(3)
        assert torch.equal(model.decode(tokens[:1, :1], caches), again)
    assert caches.lengths == {7: 13}


@options
def test_rows_are_independent(chosen):
    model, tokens = model_of(chosen), tokens_of(0, rows=3)
    together = states(model, tokens).hidden_BTD
    for row in range(3):
        assert distance(together[row], states(model, tokens[row : row + 1]).hidden_BTD[0]) <= ROUNDING


def test_generation_is_greedy_over_whole_recomputed_rows():
    model = model_of(("attention=mla",))
    prompt = tokens_of(3, rows=1, length=5)[0].tolist()
    found = list(generate(model, prompt, Settings(max_tokens=8)))
    row = list(prompt)
    for _ in range(8):
        ids = torch.tensor([row])
        with torch.no_grad():
            row.append(int(model.lm_head(model(micro_batch(ids, ids), with_mtp=False).hidden_BTD)[0, -1].argmax()))
    assert found == row[5:]


def test_tied_embeddings_are_one_matrix():
    config = configured(**(SHAPES | {"tie_embeddings": True}))
    model = random_model(config, seed=0)
    assert model.lm_head.weight is model.embed_tokens.weight
    batch: MicroBatch = micro_batch(tokens_of(0), tokens_of(0))
    model(batch, with_mtp=True).hidden_BTD.sum().backward()
    assert "lm_head.weight" not in dict(model.named_parameters())
