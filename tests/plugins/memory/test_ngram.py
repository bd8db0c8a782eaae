"""N-gram memory: keys depend on the latest tokens alone, matches are those of a plain search, decoding reads what
training reads, gradients are those of dense tables."""

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from plugins.memory.ngram import NGramMemory, following
from plugins.memory.none import NoMemory

few = settings(max_examples=25, deadline=None, derandomize=True)
VOCABULARY = 50
ORDERS = st.lists(st.integers(2, 5), max_size=3, unique=True)
MATCHES = st.lists(st.integers(1, 4), max_size=3, unique=True)


def made(orders=(2, 3), matches=(1, 2), rows=1009):
    torch.manual_seed(0)
    return NGramMemory(dim=12, vocab_size=VOCABULARY, orders=orders, rows=rows, match_orders=matches)


def drawn(batch, length, vocabulary=VOCABULARY, seed=0):
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


@few
@given(ORDERS, MATCHES, st.integers(1, 12), st.integers(0, 99))
def test_a_key_is_of_the_last_n_tokens(orders, matches, length, seed):
    assume(orders or matches)
    memory, tokens_BT = made(orders, matches), drawn(2, length, seed=seed)
    keys = memory.keys(tokens_BT)
    for order in {*orders, *matches}:
        for row in range(2):
            for i in range(length):
                alone = tokens_BT[row : row + 1, max(0, i - order + 1) : i + 1]
                assert memory.keys(alone)[order][0, -1] == keys[order][row, i]
                preceded = torch.cat((drawn(1, 7, seed=seed + 1), alone), dim=1)
                same = memory.keys(preceded)[order][0, -1] == keys[order][row, i]
                assert same == (i + 1 >= order), "a key of a row's beginning says that it is one"


def test_different_ngrams_have_different_keys():
    pairs = torch.cartesian_prod(torch.arange(300), torch.arange(300))
    assert made().keys(pairs)[2][:, 1].unique().numel() == len(pairs)
    triples = torch.cartesian_prod(*[torch.arange(40)] * 3)
    assert made().keys(triples)[3][:, 2].unique().numel() == len(triples)


def test_keys_spread_over_a_small_table():
    """As evenly as chance: the rows' loads have a Poisson's variance."""
    rows = 1024
    pairs = torch.cartesian_prod(torch.arange(200), torch.arange(200))
    load = torch.bincount(made().keys(pairs)[2][:, 1] % rows, minlength=rows).double()
    assert abs(load.var().item() / load.mean().item() - 1) < 5 * math.sqrt(2 / rows)


@few
@given(st.integers(1, 4), st.integers(1, 30), st.integers(2, 5), st.integers(0, 99))
def test_matches_are_those_of_a_plain_search(order, length, vocabulary, seed):
    tokens_BT = drawn(2, length, vocabulary, seed)
    found = following(tokens_BT, made(matches=[order]).keys(tokens_BT)[order])
    for row, tokens in enumerate(tokens_BT.tolist()):
        for i in range(length):
            latest = tokens[i - order + 1 : i + 1] if i + 1 >= order else None
            earlier = [j for j in range(order - 1, i) if tokens[j - order + 1 : j + 1] == latest]
            assert found[row, i] == (1 + tokens[earlier[-1] + 1] if earlier else 0)


@few
@given(ORDERS, MATCHES, st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 99))
def test_decoding_in_pieces_equals_reading_at_once(orders, matches, pieces, seed):
    assume(orders or matches)
    memory, length = made(orders, matches), sum(pieces)
    tokens_BT, x_BTD = drawn(3, length, vocabulary=4, seed=seed), torch.randn(3, length, 12)
    cache = memory.new_cache(range(3))
    outputs, start = [], 0
    for piece in pieces:
        here = slice(start, start + piece)
        memory(x_BTD[:, here], tokens_BT[:, here] * 0, None, cache)  # drafts that are not kept
        for row in range(3):
            cache.rewind(row, start)
        outputs.append(memory(x_BTD[:, here], tokens_BT[:, here], None, cache))
        start += piece
    assert torch.equal(torch.cat(outputs, 1), memory(x_BTD, tokens_BT))


@few
@given(ORDERS, MATCHES, st.lists(st.integers(0, 9), min_size=2, max_size=4), st.integers(1, 3), st.integers(0, 99))
def test_rows_of_unequal_length_read_as_each_alone(orders, matches, lengths, new, seed):
    assume(orders or matches)
    memory, rows = made(orders, matches), len(lengths)
    tokens_BT, x_BTD = drawn(rows, max(lengths) + new, vocabulary=3, seed=seed), torch.randn(rows, new, 12)
    cache = memory.new_cache(range(rows))
    for row, length in enumerate(lengths):
        if length:
            memory(torch.zeros(1, length, 12), tokens_BT[row : row + 1, :length], None, cache.select([row]))
    new_BT = torch.stack([tokens_BT[row, length : length + new] for row, length in enumerate(lengths)])
    together = memory(x_BTD, new_BT, None, cache)
    for row, length in enumerate(lengths):
        whole_1TD = torch.cat((torch.zeros(1, length, 12), x_BTD[row : row + 1]), 1)
        alone = memory(whole_1TD, tokens_BT[row : row + 1, : length + new])
        assert torch.equal(together[row], alone[0, length:])


@few
@given(ORDERS, MATCHES, st.integers(0, 99))
def test_a_document_reads_as_if_it_stood_alone(orders, matches, seed):
    assume(orders or matches)
    memory, tokens_BT = made(orders, matches), drawn(1, 9, vocabulary=3, seed=seed)
    x_BTD, ids_BT = torch.randn(1, 9, 12), torch.tensor([[1, 1, 1, 2, 2, 2, 2, 3, 3]])
    together = memory(x_BTD, tokens_BT, ids_BT)
    for part in (slice(0, 3), slice(3, 7), slice(7, 9)):
        assert torch.equal(together[:, part], memory(x_BTD[:, part], tokens_BT[:, part]))


def test_gradients_are_those_of_dense_tables():
    memory, tokens_BT = made(), drawn(2, 30, vocabulary=5)
    upstream_BTD = torch.randn(2, 30, 12)
    (memory(torch.zeros(2, 30, 12), tokens_BT) * upstream_BTD).sum().backward()
    keys = memory.keys(tokens_BT)
    found = [following(tokens_BT, keys[m]) + i * (VOCABULARY + 1) for i, m in enumerate((1, 2))]
    read = [
        (memory.tables[0], keys[2] % memory.rows, upstream_BTD[..., :6]),
        (memory.tables[1], keys[3] % memory.rows, upstream_BTD[..., 6:]),
        (memory.followers, torch.stack(found), upstream_BTD.expand(2, -1, -1, -1)),
    ]
    for table, ids, upstream in read:
        assert table.weight.grad.is_sparse
        expected = torch.zeros_like(table.weight)
        expected.index_add_(0, ids.flatten(), upstream.reshape(-1, upstream.shape[-1]))
        torch.testing.assert_close(table.weight.grad.to_dense(), expected)


@pytest.mark.parametrize(("orders", "matches"), [((2, 3), (1, 2, 4)), ((2,), ()), ((), (1, 3))])
def test_active_parameters_are_those_that_one_token_reads(orders, matches):
    memory = made(orders, matches)
    memory(torch.zeros(1, 9, 12), drawn(1, 9))[0, -1].sum().backward()
    read = [parameter.grad.to_dense().count_nonzero().item() for parameter in memory.parameters()]
    assert 0 < sum(read) == memory.active_parameters


def test_adds_to_what_it_is_given_in_its_dtype():
    memory, tokens_BT = made(matches=[]), drawn(2, 5)
    x_BTD = torch.randn(2, 5, 12, dtype=torch.bfloat16)
    looked_up = memory(torch.zeros(2, 5, 12), tokens_BT)
    assert looked_up.abs().min() > 0
    assert torch.equal(memory(x_BTD, tokens_BT), x_BTD + looked_up.bfloat16())
    assert NoMemory()(x_BTD, tokens_BT) is x_BTD
    assert NoMemory().new_cache([0]) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("orders", []),
        ("orders", [1]),
        ("orders", [2, 2]),
        ("orders", [2, 3, 4, 5, 6]),
        ("match_orders", [0]),
        ("rows", 0),
    ],
)
def test_impossible_settings_are_refused(key, value):
    settings = {"orders": [2], "rows": 8, "match_orders": [1] if value else []} | {key: value}
    with pytest.raises(ValueError, match=rf"memory\.{key}"):
        NGramMemory(dim=12, vocab_size=9, **settings)
