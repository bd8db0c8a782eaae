"""Caches of decoding: rows grow in blocks with their texts, rewind and are copied each for itself."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.model.layers import CACHE_BLOCK, PositionCache, next_positions

few = settings(max_examples=50, deadline=None, derandomize=True)


def made(rows=(), shape=(2, 3)):
    return PositionCache(*shape, dtype=torch.float32, device=torch.device("cpu"), rows=rows)


class Plain:
    """The same by lists: each row's positions, one tensor [2, 3] each."""

    def __init__(self):
        self.rows = {}

    def check(self, cache):
        assert cache.lengths == {row: len(held) for row, held in self.rows.items()}
        for row, held in self.rows.items():
            found = cache.rows[row]
            assert found.held.shape[-2] <= len(held) + CACHE_BLOCK
            assert found.held.shape[-2] % CACHE_BLOCK == 0
            assert found.held.isfinite().all()
            if held:
                assert torch.equal(cache.select([row]).read()[0], torch.stack(held, dim=1))


STEP = st.tuples(st.sampled_from(["add", "copy", "drop", "rewind", "append"]), st.integers(0, 99), st.integers(0, 150))


@few
@given(steps=st.lists(STEP, max_size=30))
def test_rows_are_those_of_plain_lists(steps):
    cache, plain, number = made(shape=(2, 3)), Plain(), 0
    for what, chosen, amount in steps:
        rows = list(plain.rows)
        if what == "add" or not rows:
            cache.add(number)
            plain.rows[number] = []
            number += 1
            continue
        row = rows[chosen % len(rows)]
        held = plain.rows[row]
        if what == "copy":
            cache.copy(row, number, amount % (len(held) + 1))
            plain.rows[number] = held[: amount % (len(held) + 1)]
            number += 1
        elif what == "drop":
            cache.drop(row)
            del plain.rows[row]
        elif what == "rewind":
            cache.rewind(row, amount % (len(held) + 1))
            plain.rows[row] = held[: amount % (len(held) + 1)]
        else:
            some = rows[: 1 + chosen % 3]
            new = torch.randn(len(some), 2, amount % 70 + 1, 3)
            cache.select(some).append(new)
            for b, other in enumerate(some):
                plain.rows[other] = plain.rows[other] + list(new[b].unbind(1))
        plain.check(cache)
    assert {row: found.length for row, found in cache.rows.items()} == {
        row: len(held) for row, held in plain.rows.items()
    }


def test_rows_are_read_together_with_zeros_after_the_shorter_ones():
    cache = made(rows=[4, 2])
    cache.select([2]).append(torch.ones(1, 2, 3, 3))
    cache.append(torch.full((2, 2, 1, 3), 2.0))
    together = cache.read()
    assert together.shape == (2, 2, 4, 3)
    assert together[0, 0, :, 0].tolist() == [2, 0, 0, 0]
    assert together[1, 0, :, 0].tolist() == [1, 1, 1, 2]


def test_a_single_row_is_read_where_it_lies():
    cache = made(rows=[0])
    cache.append(torch.randn(1, 2, 5, 3))
    assert cache.read().data_ptr() == cache.rows[0].held.data_ptr()


@pytest.mark.parametrize("lengths", [[3], [3, 3], [0, 5, 2]])
def test_new_positions_follow_each_row(lengths):
    found = next_positions(lengths, 2, torch.device("cpu"))
    assert found.tolist() == [[length, length + 1] for length in lengths]
