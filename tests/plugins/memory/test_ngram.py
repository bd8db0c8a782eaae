"""N-gram memory: its addresses depend on the latest tokens alone, decoding reads what training reads, gradients are
those of a dense table."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.memory.ngram import NGramMemory
from plugins.memory.none import NoMemory

few = settings(max_examples=25, deadline=None, derandomize=True)
ORDERS = st.lists(st.integers(2, 5), min_size=1, max_size=3, unique=True)


def made(orders, rows=1009, width=4):
    torch.manual_seed(0)
    return NGramMemory(dim=width * len(orders), orders=orders, rows=rows)


def endless(orders):
    """With so many rows that no two n-grams of a test share one; the tables have shapes only."""
    with torch.device("meta"):
        return made(orders, rows=2**40)


def drawn(batch, length, vocabulary=50, seed=0):
    return torch.randint(vocabulary, (batch, length), generator=torch.Generator().manual_seed(seed))


@few
@given(ORDERS, st.integers(1, 12), st.integers(0, 99))
def test_an_address_is_of_the_last_n_tokens(orders, length, seed):
    memory, tokens_BT = endless(orders), drawn(2, length, seed=seed)
    for order, ids_BT in zip(orders, memory.addresses(tokens_BT), strict=True):
        for row in range(2):
            for i in range(length):
                alone = tokens_BT[row : row + 1, max(0, i - order + 1) : i + 1]
                if i + 1 >= order:  # the same n-gram elsewhere has the same address
                    shifted = torch.cat((drawn(1, 7, seed=seed + 1), alone), dim=1)
                    assert memory.addresses(shifted)[orders.index(order)][0, -1] == ids_BT[row, i]
                else:  # at the beginning, one that says so
                    assert memory.addresses(alone)[orders.index(order)][0, -1] == ids_BT[row, i]
                    preceded = torch.cat((torch.zeros(1, order, dtype=torch.int64), alone), dim=1)
                    assert memory.addresses(preceded)[orders.index(order)][0, -1] != ids_BT[row, i]


def test_different_ngrams_have_different_addresses_in_a_large_table():
    memory = endless([2])
    pairs = torch.cartesian_prod(torch.arange(300), torch.arange(300))
    assert memory.addresses(pairs)[0][:, 1].unique().numel() == len(pairs)


def test_addresses_spread_over_a_small_table():
    """As evenly as chance: the rows' loads have a Poisson's variance."""
    rows = 1024
    pairs = torch.cartesian_prod(torch.arange(200), torch.arange(200))
    load = torch.bincount(made([2], rows=rows).addresses(pairs)[0][:, 1], minlength=rows).double()
    assert abs(load.var().item() / load.mean().item() - 1) < 5 * math.sqrt(2 / rows)


@few
@given(ORDERS, st.lists(st.integers(1, 5), min_size=1, max_size=5), st.integers(0, 99))
def test_decoding_in_pieces_equals_reading_at_once(orders, pieces, seed):
    memory, length = made(orders), sum(pieces)
    tokens_BT, x_BTD = drawn(3, length, seed=seed), torch.randn(3, length, 4 * len(orders))
    (cache,) = memory.new_caches(3, length)
    outputs, start = [], 0
    for piece in pieces:
        here = slice(start, start + piece)
        memory(x_BTD[:, here], tokens_BT[:, here] * 0, None, cache)  # drafts that are not kept
        cache.rewind(start)
        outputs.append(memory(x_BTD[:, here], tokens_BT[:, here], None, cache))
        start += piece
    assert torch.equal(torch.cat(outputs, 1), memory(x_BTD, tokens_BT))
    with pytest.raises(ValueError, match=f"holds {length} positions, {length + 1} are needed"):
        memory(x_BTD[:, :1], tokens_BT[:, :1], None, cache)


@few
@given(ORDERS, st.integers(0, 99))
def test_a_document_reads_as_if_it_stood_alone(orders, seed):
    memory, tokens_BT = made(orders), drawn(1, 9, seed=seed)
    ids_BT = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 3, 3]])
    together = memory.addresses(tokens_BT, ids_BT)
    for start, end in ((0, 3), (3, 7), (7, 9)):
        for one, alone in zip(together, memory.addresses(tokens_BT[:, start:end]), strict=True):
            assert torch.equal(one[:, start:end], alone)


def test_gradients_are_those_of_a_dense_table_and_only_of_rows_read():
    memory, tokens_BT = made([2, 3]), drawn(2, 30, vocabulary=5)
    x_BTD, upstream = torch.randn(2, 30, 8), torch.randn(2, 30, 8)
    (memory(x_BTD, tokens_BT) * upstream).sum().backward()
    for i, (table, ids_BT) in enumerate(zip(memory.tables, memory.addresses(tokens_BT), strict=True)):
        expected = torch.zeros_like(table.weight)
        expected.index_add_(0, ids_BT.flatten(), upstream[..., 4 * i : 4 * i + 4].flatten(0, 1))
        assert table.weight.grad.is_sparse
        torch.testing.assert_close(table.weight.grad.to_dense(), expected)


def test_adds_to_what_it_is_given_in_its_dtype():
    memory, tokens_BT = made([2, 3]), drawn(2, 5)
    x_BTD = torch.randn(2, 5, 8, dtype=torch.bfloat16)
    looked_up = memory(torch.zeros(2, 5, 8), tokens_BT)
    assert looked_up.abs().min() > 0
    assert torch.equal(memory(x_BTD, tokens_BT), x_BTD + looked_up.bfloat16())
    assert NoMemory()(x_BTD, tokens_BT) is x_BTD
    assert NoMemory().new_caches(1, 4) == []


@pytest.mark.parametrize(("orders", "rows"), [([], 8), ([1], 8), ([2, 2], 8), ([2, 3, 4], 8), ([2], 0)])
def test_impossible_settings_are_refused(orders, rows):
    with pytest.raises(ValueError, match=r"memory\.(orders|rows)="):
        NGramMemory(dim=8, orders=orders, rows=rows)
