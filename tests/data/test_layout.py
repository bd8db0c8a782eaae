"""Rows by number: each token once per epoch, the same row whoever reads it, the shares of the mixture."""

import itertools
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from data.edition import DomainEdition
from data.layout import PERIOD, DomainRows, Epoch, Packing, Rows, document_order, mixture, read_layout, write_layout
from data.store import DomainTokens
from tests.data.conftest import Make, training_texts

PAD = 0


def tokens_of(lengths: list[int], shards: int = 3) -> DomainTokens:
    """Documents whose tokens are consecutive numbers from 1, in several shards, with others left out between them."""
    ids = np.arange(1, 1 + sum(lengths), dtype=np.uint32)
    ends = np.cumsum(lengths)
    cuts = [int(ends[len(lengths) * i // shards - 1]) for i in range(1, shards) if len(lengths) * i // shards]
    return DomainTokens(np.split(ids, cuts), ends - lengths, np.array(lengths))


def rows_of(
    folder: Path,
    lengths: list[int],
    *,
    length: int,
    seed: int = 1,
    packing: Packing = "cut",
    edition: DomainEdition | None = None,
) -> DomainRows:
    tokens = tokens_of(lengths)

    def epoch(number: int) -> Epoch:
        place = folder / f"{seed}-{number}"
        if not place.exists():
            place.mkdir()
            write_layout(
                place,
                tokens=tokens,
                edition=edition,
                seed=seed,
                domain="d",
                epoch=number,
                packing=packing,
                length=length + 1,
            )
        return read_layout(place, tokens=tokens, edition=edition)

    return DomainRows("d", seed=seed, length=length + 1, pad=PAD, epoch=epoch)


LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=30)


@settings(max_examples=30)
@given(lengths=LENGTHS, length=st.integers(1, 30), seed=st.integers(0, 5))
def test_every_token_is_a_target_once_an_epoch_and_documents_stay_whole_in_the_stream(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], length: int, seed: int
) -> None:
    """Rows, put back in the order of the stream, are the documents of epoch after epoch end to end."""
    rows = rows_of(tmp_path_factory.mktemp("rows"), lengths, length=length, seed=seed)
    total, epochs = sum(lengths), 4
    count = (epochs * total - 1) // length
    found = sorted((rows[i].tolist() for i in range(count)), key=lambda row: row)
    stream = expected_stream(rows, lengths, seed, epochs)
    wanted = sorted(stream[i * length : i * length + length + 1] for i in range(count))
    assert found == wanted


def expected_stream(rows: DomainRows, lengths: list[int], seed: int, epochs: int) -> list[int]:
    ends = np.cumsum(lengths)
    documents = [list(range(1 + end - size, 1 + end)) for end, size in zip(ends.tolist(), lengths)]
    return [
        token
        for epoch in range(epochs)
        for document in document_order(len(lengths), seed=seed, domain="d", epoch=epoch)
        for token in documents[document]
    ]


@settings(max_examples=25)
@given(lengths=LENGTHS, length=st.integers(1, 30))
def test_rows_belong_to_the_epoch_that_fills_them(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], length: int
) -> None:
    """After the rows of an epoch, at most a row's tokens of it are left, which open the next one."""
    rows = rows_of(tmp_path_factory.mktemp("rows"), lengths, length=length)
    total, epochs = sum(lengths), 3
    epoch_of = [rows.epoch_of(i) for i in range((epochs * total - 1) // length)]
    assert epoch_of == sorted(epoch_of)
    for epoch in range(epochs):
        done = sum(e <= epoch for e in epoch_of)
        assert 0 < (epoch + 1) * total - done * length <= length


@settings(max_examples=8)
@given(lengths=LENGTHS, length=st.integers(1, 20), seed=st.integers(0, 5))
def test_a_row_is_the_same_read_alone_in_order_or_by_four_threads(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], length: int, seed: int
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    count = 1 + 3 * sum(lengths) // length
    in_order = [rows_of(folder, lengths, length=length)[i].tolist() for i in range(count)]
    shuffled = random.Random(seed).sample(range(count), count)
    one = rows_of(folder, lengths, length=length)
    for i in shuffled:
        assert one[i].tolist() == in_order[i]
    alone = rows_of(folder, lengths, length=length)
    assert alone[count - 1].tolist() == in_order[-1]
    with ThreadPoolExecutor(4) as pool:
        shared = rows_of(folder, lengths, length=length)
        assert [row.tolist() for row in pool.map(shared.__getitem__, range(count))] == in_order


def test_rows_of_an_epoch_are_mixed_over_all_of_it(tmp_path: Path) -> None:
    """Consecutive rows are of far apart documents, and the places of rows are uniform over the epoch."""
    lengths = [500] * 40
    rows = rows_of(tmp_path, lengths, length=50)
    order = document_order(40, seed=1, domain="d", epoch=0).tolist()
    place = {document: i for i, document in enumerate(order)}
    documents = [place[(int(rows[i][10]) - 1) // 500] for i in range(360)]
    assert sum(a == b for a, b in itertools.pairwise(documents)) < 30
    firsts = [document // 10 for document in documents[:120]]
    assert chisquare(np.bincount(firsts, minlength=4)).pvalue > 0.001


@settings(max_examples=30)
@given(lengths=LENGTHS, length=st.integers(1, 45))
def test_whole_documents_come_once_an_epoch_and_are_never_cut(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], length: int
) -> None:
    folder = tmp_path_factory.mktemp("rows")
    fitting = [size for size in lengths if size <= length + 1]
    rows = rows_of(folder, lengths, length=length, packing="whole")
    if not fitting:
        with pytest.raises(ValueError, match=rf"data\.packing=whole, and no document fits .*{length + 1} tokens"):
            rows[0]
        return
    ends = np.cumsum(lengths)
    starts = {int(end - size) + 1: size for end, size in zip(ends, lengths) if size <= length + 1}
    for epoch in range(2):
        seen: Counter[int] = Counter()
        for i in itertools.count():
            if rows.epoch_of(i) > epoch:
                break
            if rows.epoch_of(i) < epoch:
                continue
            row = rows[i].tolist()
            assert len(row) == length + 1
            while row and row[0] != PAD:
                size = starts[row[0]]
                assert row[:size] == list(range(row[0], row[0] + size))
                seen[row[0]] += 1
                row = row[size:]
            assert not any(row)
        assert seen == Counter(starts.keys())


def test_rendered_documents_stand_in_for_the_stores(tmp_path: Path) -> None:
    """Of five documents the second and fifth are rendered, the fifth longer than before."""
    files = [np.array([100, 101], np.uint32), np.array([200, 201, 202], np.uint32)]
    rendered = DomainEdition(files, np.array([1, 4]), np.array([2, 3]))
    rows = rows_of(tmp_path, [4, 2, 3, 5, 2], length=1, edition=rendered)
    targets = Counter(int(token) for i in range(16) for token in rows[i][1:])
    first = int(rows_first(rows))
    assert targets + Counter([first]) == Counter([1, 2, 3, 4, 100, 101, 7, 8, 9, 10, 11, 12, 13, 14, 200, 201, 202])


def rows_first(rows: DomainRows) -> int:
    """The token that begins the stream, which is no target."""
    inputs = Counter(int(rows[i][0]) for i in range(16))
    targets = Counter(int(rows[i][1]) for i in range(16))
    (only,) = (inputs - targets).elements()
    return only


def test_document_orders_are_uniform_and_differ_by_seed_domain_and_epoch() -> None:
    orders = [tuple(document_order(4, seed=seed, domain="d", epoch=epoch)) for seed in range(60) for epoch in range(40)]
    counts = Counter(orders)
    assert len(counts) == 24
    assert chisquare(list(counts.values())).pvalue > 0.001
    base = document_order(50, seed=1, domain="d", epoch=1)
    for other in ({"seed": 2, "epoch": 0}, {"seed": 1, "epoch": 0}, {"seed": 1, "epoch": 1, "domain": "e"}):
        assert (document_order(50, **({"domain": "d"} | other)) != base).any()  # type: ignore[arg-type]


WEIGHTS = st.lists(st.one_of(st.integers(1, 20), st.floats(0.01, 5.0)), min_size=1, max_size=9)


@settings(max_examples=12)
@given(weights=WEIGHTS)
@example(weights=[2, 20, 20, 15, 0.0523, 20, 0.3858, 0.3294, 15])
@example(weights=[1])
def test_each_domain_keeps_to_its_share(weights: list[float]) -> None:
    table = mixture({str(i): weight for i, weight in enumerate(weights)})
    shares = np.array(weights) / sum(weights)
    given_rows = np.cumsum(np.eye(len(weights))[table], axis=0)
    expected = np.arange(1, len(table) + 1)[:, None] * shares
    away = np.abs(given_rows - expected).max(axis=1)
    assert away.max() < 1
    assert away[-1] < 1e-4 or len(table) == PERIOD


def test_simple_weights_are_exact_and_a_tiny_one_is_refused() -> None:
    table = mixture({"code": 0.65, "prose": 0.1, "math": 0.25})
    assert np.bincount(table).tolist() == [13, 2, 5]
    with pytest.raises(ValueError, match=r"data\.sources\.b\.weight=1e-06: must be at least 1/10,000"):
        mixture({"a": 1.0, "b": 1e-6})


class Numbers:
    """Stands for a domain: row i is the number i."""

    def __init__(self, domain: int) -> None:
        self.domain = domain

    def __getitem__(self, index: int) -> Any:
        return (self.domain, index)


@settings(max_examples=25)
@given(weights=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_rows_of_each_domain_come_in_order_without_a_gap(weights: list[int]) -> None:
    table = mixture({str(i): float(weight) for i, weight in enumerate(weights)})
    rows = Rows([Numbers(i) for i in range(len(weights))], table)  # type: ignore[misc]
    seen = [0] * len(weights)
    for i in range(3 * len(table) + 1):
        assert rows.given(i) == seen
        tokens, domain = rows[i]
        assert tokens == (domain, seen[domain])  # type: ignore[comparison-overlap]
        seen[domain] += 1


def test_the_default_pipeline_reads_every_document_once_an_epoch(make: Make) -> None:
    none = {"rate": 0.0, "order": "psm", "max_characters": None}
    data = make(fim=none, split_punctuation_newline=0.0, sequence_length=50)
    texts = training_texts(data, "short")
    layout = data.prepared.epoch("short", 0)
    ids = np.concatenate(layout.read(0, layout.tokens)).tolist()
    ends = [i + 1 for i, token in enumerate(ids) if token == data.tokenizer.eos]
    found = [data.tokenizer.decode(ids[a:b]) for a, b in itertools.pairwise([0, *ends])]
    assert found != texts
    assert Counter(found) == Counter(texts)
