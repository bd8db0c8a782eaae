"""Rows dealt in pieces: every token a target once, pieces of one length and of different rows, exact resume."""

import itertools
import json
from collections import Counter

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import data.pieces
from data.pieces import Pieces, largest_divisor
from data.pipeline import Pack
from tests.data.conftest import Make

few = settings(max_examples=40, deadline=None)
LENGTHS = st.sampled_from([1, 6, 8, 12, 13])
CHANGES = st.lists(st.tuples(st.integers(0, 400), st.floats(1, 20)), max_size=3)


class Rows(grain.IterDataset):
    """Row i holds the numbers from 1000 i on, its overlap with a next one included."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def __iter__(self) -> grain.DatasetIterator:
        return _RowsIterator(self.length)


class _RowsIterator(grain.DatasetIterator):
    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.row = length, 0

    def __next__(self) -> Pack:
        self.row += 1
        return Pack(np.arange(self.length + 1) + 1000 * self.row, self.row % 3)

    def get_state(self) -> int:
        return self.row

    def set_state(self, state: int) -> None:
        self.row = state


def schedule(changes: list[tuple[int, float]], first: float):
    return lambda tokens: [first, *(limit for at, limit in sorted(changes) if at <= tokens)][-1]


@pytest.fixture(autouse=True)
def _small_pools(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data.pieces, "POOL_ROWS", 5)


@few
@given(LENGTHS, CHANGES, st.floats(0.5, 20), st.integers(1, 4))
def test_every_token_is_a_target_once_and_micro_batches_have_one_length(length, changes, first, unit):
    packs = iter(Pieces(Rows(length), length=length, piece_length=schedule(changes, first), unit=unit))
    targets, tokens = Counter(), 0
    while tokens < 40 * length or any(count != length for count in Counter(t // 1000 for t in targets).values()):
        one = next(packs)
        pieces = length // (len(one.tokens) - 1)
        micro = [one, *(next(packs) for _ in range(unit * pieces - 1))]
        assert {len(pack.tokens) for pack in micro} == {len(one.tokens)}
        for tokens_of, domain in micro:
            assert tokens_of.tolist() == list(range(tokens_of[0], tokens_of[-1] + 1)), "a piece is of one row"
            assert domain == tokens_of[0] // 1000 % 3
            targets.update(tokens_of[1:].tolist())
        tokens += unit * length
        assert tokens < 10_000 * length
    assert max(targets.values()) == 1
    rows = {target // 1000 for target in targets}
    assert set(targets) == {1000 * row + i for row in rows for i in range(1, length + 1)}


def test_a_pools_pieces_come_from_all_its_rows_in_turn():
    packs = iter(Pieces(Rows(8), length=8, piece_length=lambda tokens: 4, unit=3))
    rows = [next(packs).tokens[0] for _ in range(12)]
    assert rows == [1000 * i for i in range(1, 7)] + [1000 * i + 4 for i in range(1, 7)], "5 rows, up to whole threes"


@few
@given(LENGTHS, CHANGES, st.floats(0.5, 20), st.integers(1, 4), st.integers(0, 90))
def test_resumes_anywhere_whatever_the_schedule_says_by_then(length, changes, first, unit, at):
    def packs(limit=first):
        return iter(Pieces(Rows(length), length=length, piece_length=schedule(changes, limit), unit=unit))

    whole = [pack.tokens.tolist() for pack in itertools.islice(packs(), at + 60)]
    begun = packs()
    for _ in range(at):
        next(begun)
    state = json.loads(json.dumps(begun.get_state()))
    resumed = packs()
    resumed.set_state(state)
    assert resumed.get_state() == state
    assert [pack.tokens.tolist() for pack in itertools.islice(resumed, 60)] == whole[at:]
    other = packs(limit=1)
    other.set_state(state)
    rest = state["size"] * (length // state["piece"]) - state["dealt"]
    found = [pack.tokens.tolist() for pack in itertools.islice(other, min(rest, 60))]
    assert found == whole[at : at + min(rest, 60)], "a pool that is begun is dealt to its end"


@given(st.integers(1, 200), st.floats(0, 300))
def test_largest_divisor(length, limit):
    found = largest_divisor(length, limit)
    assert length % found == 0
    assert found <= max(limit, 1)
    assert not any(length % d == 0 and d <= limit for d in range(found + 1, length + 1))


def test_steps_keep_their_tokens_and_lengthen(make: Make) -> None:
    data = make(train_length=lambda tokens: 16 if tokens < 3000 else 64)
    steps = list(data.steps())
    assert [step.tokens_before for step in steps] == [256 * i for i in range(30)]
    lengths = [micro.tokens_BT.shape[1] for step in steps for micro in step.micro_batches]
    assert sorted(set(lengths)) == [16, 64]
    assert lengths == sorted(lengths)
    assert all(micro.tokens_BT.numel() == 256 for step in steps for micro in step.micro_batches)
    again = make(train_length=lambda tokens: 16 if tokens < 3000 else 64)
    again.restore(json.loads(json.dumps(steps[4].state_after)))
    for one, other in zip(steps[5:], again.steps(), strict=True):
        assert all(
            (a.tokens_BT == b.tokens_BT).all() for a, b in zip(one.micro_batches, other.micro_batches, strict=True)
        )
