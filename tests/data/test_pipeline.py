"""The training stream: packing, shares, shuffling, splitting of joined tokens, and exact resume."""

import itertools
import json
from collections import Counter, defaultdict
from typing import Any

import grain
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.datamodule import DataModule
from data.fim import FillInTheMiddle, invert
from data.pipeline import Mixture, Packing, Rendering, joined_tokens, training_rows
from data.tokenizer import ByteLevelBPE
from tests.data.conftest import Make


def stream(documents: list[np.ndarray]) -> grain.IterDataset:
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    return grain.MapDataset.source(documents).to_iter_dataset(options)


def counting(lengths: list[int], first: int = 0) -> list[np.ndarray]:
    """Documents whose tokens are consecutive numbers."""
    ends = np.cumsum([first, *lengths])
    return [np.arange(a, b) for a, b in itertools.pairwise(ends)]


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=30), length=st.integers(1, 16))
def test_rows_overlap_by_one_token_and_concatenate_to_the_documents(lengths: list[int], length: int) -> None:
    rows = list(Packing(stream(counting(lengths)), length=length))
    assert len(rows) == (sum(lengths) - 1) // length
    for row in rows:
        assert len(row) == length + 1
    for row, following in itertools.pairwise(rows):
        assert row[-1] == following[0]
    targets = np.concatenate([row[1:] for row in rows]) if rows else np.array([])
    assert targets.tolist() == list(range(1, len(targets) + 1))


@given(
    lengths=st.lists(st.integers(1, 40), min_size=5, max_size=30),
    length=st.integers(1, 16),
    at=st.integers(0, 20),
)
def test_packing_resumes_anywhere(lengths: list[int], length: int, at: int) -> None:
    def rows() -> Any:
        return iter(Packing(stream(counting(lengths)), length=length))

    whole = [row.tolist() for row in rows()]
    first = rows()
    for _ in range(min(at, len(whole))):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    second = rows()
    second.set_state(state)
    assert second.get_state() == state
    assert [row.tolist() for row in second] == whole[min(at, len(whole)) :]


@given(shares=st.lists(st.floats(0.05, 1.0), min_size=2, max_size=4))
def test_shares_of_rows_hold_from_the_first_row_on(shares: list[float]) -> None:
    parents = [stream([np.zeros(3, dtype=np.int64)] * 1000) for _ in shares]
    mixture = iter(Mixture(parents, weights=shares))
    counts = np.zeros(len(shares))
    for _ in range(300):
        counts[next(mixture).domain] += 1
        expected = counts.sum() * np.array(shares) / sum(shares)
        assert np.all(np.abs(counts - expected) < len(shares) / 2)


def test_joined_tokens_are_punctuation_and_line_breaks(tokenizer: ByteLevelBPE) -> None:
    found = joined_tokens(tokenizer)
    names = {tokenizer.decode([token]) for token in found}
    assert {".\n", ":\n"} <= names
    assert not any(name.isspace() or any(letter.isalnum() for letter in name) for name in names)
    for token, halves in found.items():
        assert tokenizer.decode_bytes(halves) == tokenizer.decode_bytes([token])
        assert len(halves) >= 2
        head, line_breaks = tokenizer.decode([token]).rstrip("\r\n"), tokenizer.decode([token]).lstrip(" .:,;()")
        assert halves == tokenizer.encode(head) + tokenizer.encode(line_breaks)


def rendering(data: DataModule, **changes: Any) -> Rendering:
    fim = FillInTheMiddle(rate=0.0, order="psm", max_characters=None)
    settings: dict[str, Any] = {"seed": 1, "fim": fim, "split_punctuation_newline": 0.0, **changes}
    return Rendering(tokenizer=data.tokenizer, **settings)


@pytest.fixture(scope="module")
def data(make: Make) -> DataModule:
    module = make()
    module.setup()
    return module


def test_share_of_joined_tokens_is_split_and_no_byte_changes(data: DataModule) -> None:
    joined = joined_tokens(data.tokenizer)
    domain = data._train["long"]
    plain, split = rendering(data), rendering(data, split_punctuation_newline=0.3)
    before = after = 0
    for i in range(len(domain.numbers)):
        one, other = plain(domain, i, 0).tolist(), split(domain, i, 0).tolist()
        assert data.tokenizer.decode_bytes(one) == data.tokenizer.decode_bytes(other)
        before += sum(token in joined for token in one)
        after += sum(token in joined for token in other)
        assert split(domain, i, 1).tolist() != other
        assert split(domain, i, 0).tolist() == other
    assert before > 1000
    assert abs(1 - after / before - 0.3) < 0.05


def test_ordinary_documents_run_from_bos_to_eos(data: DataModule) -> None:
    domain = data._train["middle"]
    tokenizer = data.tokenizer
    for i in range(len(domain.numbers)):
        expected = [tokenizer.bos, *tokenizer.encode(domain.texts[i]["text"]), tokenizer.eos]
        assert rendering(data)(domain, i, 0).tolist() == expected


def test_rearranged_documents_change_with_the_epoch_and_keep_their_text(data: DataModule) -> None:
    fim = FillInTheMiddle(rate=1.0, order="psm", max_characters=300)
    render = rendering(data, fim=fim)
    domain = data._train["middle"]
    for i in range(len(domain.numbers)):
        first, second = render(domain, i, 0).tolist(), render(domain, i, 1).tolist()
        assert first != second
        text = domain.texts[i]["text"]
        assert invert(first, tokenizer=data.tokenizer) == invert(second, tokenizer=data.tokenizer) == text


def test_every_document_comes_once_an_epoch_in_changing_order(data: DataModule) -> None:
    domain = data._train["short"]
    count = len(domain.numbers)
    rows = iter(
        training_rows(
            domains={"short": domain},
            weights={"short": 1.0},
            rendering=rendering(data),
            sequence_length=50,
            shuffle_window=1,
            seed=1,
        )
    )
    per_epoch = sum(len(domain.document(i)) for i in range(count))
    tokens = list(next(rows).tokens)
    while len(tokens) < 2 * per_epoch:
        tokens += list(next(rows).tokens[1:])
    texts = [data.tokenizer.decode(part) for part in _documents(tokens[: 2 * per_epoch], data.tokenizer.eos)]
    epochs = texts[:count], texts[count:]
    assert epochs[0] != epochs[1]
    assert Counter(epochs[0]) == Counter(epochs[1]) == Counter(domain.texts["text"])


def _documents(tokens: list[int], eos: int) -> list[list[int]]:
    ends = [i + 1 for i, token in enumerate(tokens) if token == eos]
    return [tokens[a:b] for a, b in itertools.pairwise([0, *ends])]


def test_window_holds_the_packed_rows_in_another_order(data: DataModule) -> None:
    def rows(window: int) -> dict[int, list[tuple[int, ...]]]:
        found = training_rows(
            domains=data._train,
            weights={"long": 0.5, "middle": 0.3, "short": 0.2},
            rendering=rendering(data),
            sequence_length=50,
            shuffle_window=window,
            seed=1,
        )
        by_domain: dict[int, list[tuple[int, ...]]] = defaultdict(list)
        for row in itertools.islice(found, 200):
            by_domain[row.domain].append(tuple(row.tokens))
        return by_domain

    shuffled, plain = rows(20), rows(1)
    for domain in range(3):
        assert shuffled[domain] != plain[domain]
        for start in range(0, len(plain[domain]) - 19, 20):
            window = slice(start, start + 20)
            assert Counter(shuffled[domain][window]) == Counter(plain[domain][window])


def test_every_stretch_of_rows_has_the_shares_of_the_domains_to_within_a_row(data: DataModule) -> None:
    weights = {"long": 0.5, "middle": 0.3, "short": 0.2}
    found = training_rows(
        domains=data._train, weights=weights, rendering=rendering(data), sequence_length=50, shuffle_window=4, seed=1
    )
    domains = [row.domain for row in itertools.islice(found, 400)]
    for start in range(0, 400, 40):
        counts = Counter(domains[start : start + 40])
        assert all(abs(counts[i] - 40 * share) <= 1 for i, share in enumerate(weights.values()))
