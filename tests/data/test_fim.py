"""Fill-in-the-middle: how often, what it looks like, and that it can be undone."""

import bisect
import itertools

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.fim import FillInTheMiddle, invert, pieces, rearrange
from data.tokenizer import ByteLevelBPE
from dsv3.prompts.infilling import Order, infilling_prompt

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=0, max_size=300)
ORDERS = st.sampled_from(["psm", "spm"])


def rearranged(tokenizer: ByteLevelBPE, text: str, order: Order, longest: int | None, document: int = 7) -> list[int]:
    fim = FillInTheMiddle(rate=1.0, order=order, max_characters=longest)
    parts = [text[: len(text) // 3], text[len(text) // 3 :]]  # parts do not matter
    draws = np.random.default_rng(document)
    return list(itertools.chain(*rearrange(parts, settings=fim, random=draws, tokenizer=tokenizer)))


def sequences(tokenizer: ByteLevelBPE, ids: list[int]) -> list[list[int]]:
    """The sequences from BOS to EOS that a document became."""
    starts = [i for i, token in enumerate(ids) if token == tokenizer.bos]
    return [ids[a:b] for a, b in zip(starts, [*starts[1:], len(ids)])]


@settings(max_examples=300)
@given(text=TEXTS, order=ORDERS, longest=st.one_of(st.none(), st.integers(1, 80)), document=st.integers(0, 2**32))
def test_inverse_is_exact(tokenizer: ByteLevelBPE, text: str, order: Order, longest: int | None, document: int) -> None:
    assert invert(rearranged(tokenizer, text, order, longest, document), tokenizer=tokenizer) == text


@given(text=TEXTS)
def test_inverse_of_an_ordinary_document(tokenizer: ByteLevelBPE, text: str) -> None:
    assert invert([tokenizer.bos, *tokenizer.encode(text), tokenizer.eos], tokenizer=tokenizer) == text


@settings(max_examples=200)
@given(text=TEXTS, document=st.integers(0, 1000), longest=st.integers(1, 80))
def test_each_sequence_is_a_prompt_its_middle_and_eos(
    tokenizer: ByteLevelBPE, text: str, document: int, longest: int
) -> None:
    """The parts, read back from the ids, are whole characters, and make the very prompt that generation uses."""
    found = sequences(tokenizer, rearranged(tokenizer, text, "psm", longest, document))
    for ids, piece in zip(found, pieces([text], longest), strict=True):
        hole, end = ids.index(tokenizer.fim_hole), ids.index(tokenizer.fim_end)
        parts = (ids[2:hole], ids[end + 1 : -1], ids[hole + 1 : end])
        prefix, middle, suffix = (tokenizer.decode_bytes(part).decode("utf-8", errors="strict") for part in parts)
        assert prefix + middle + suffix == piece
        prompt = infilling_prompt(tokenizer, prefix, suffix, "psm")
        assert ids == [*prompt, *tokenizer.encode(middle), tokenizer.eos]
        # The same draws, suffix first.
        spm = infilling_prompt(tokenizer, prefix, suffix, "spm")
        assert [*spm, *tokenizer.encode(middle), tokenizer.eos] in sequences(
            tokenizer, rearranged(tokenizer, text, "spm", longest, document)
        )


def test_token_order_of_both_forms(tokenizer: ByteLevelBPE) -> None:
    bos, begin, hole, end = tokenizer.bos, tokenizer.fim_begin, tokenizer.fim_hole, tokenizer.fim_end
    x, y = tokenizer.encode("x"), tokenizer.encode("y")
    assert infilling_prompt(tokenizer, "x", "y", "psm") == [bos, begin, *x, hole, *y, end]
    assert infilling_prompt(tokenizer, "x", "y", "spm") == [bos, begin, hole, *y, end, *x]


@given(text=TEXTS, longest=st.integers(1, 50), parts=st.integers(1, 7))
@example(text="0000000000\x1e\x85", longest=2, parts=1)
def test_pieces_are_consecutive_short_and_cut_between_lines(text: str, longest: int, parts: int) -> None:
    found = list(pieces([text], longest))
    assert "".join(found) == text
    assert all(0 < len(piece) <= longest for piece in found)
    lines = text.splitlines(keepends=True)
    ends = list(itertools.accumulate(map(len, lines)))
    for cut in list(itertools.accumulate(map(len, found)))[:-1]:
        line = bisect.bisect_right(ends, cut)  # that the next piece begins in
        assert cut in (0, *ends) or len(lines[line]) > longest
    assert list(pieces((text[i : i + parts] for i in range(0, len(text), parts)), longest)) == found


@pytest.mark.parametrize(
    ("fim", "key"),
    [
        (FillInTheMiddle(rate=1.5, order="psm", max_characters=None), "data.fim.rate=1.5"),
        (FillInTheMiddle(rate=0.1, order="mps", max_characters=None), "data.fim.order=mps"),  # type: ignore[arg-type]
        (FillInTheMiddle(rate=0.1, order="psm", max_characters=0), "data.fim.max_characters=0"),
    ],
)
def test_wrong_settings_are_named(fim: FillInTheMiddle, key: str) -> None:
    with pytest.raises(ValueError, match=key.replace(".", r"\.")):
        fim.check()
