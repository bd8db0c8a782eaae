"""Words that are remembered: the ids of the `tokenizers` library, for any text."""

import functools
import pickle
import sys

import pytest
import regex
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Regex, pre_tokenizers

from data.tokenizer import ByteLevelBPE
from data.words import KNOWN, REMEMBERED, UNSURE, patterns_of

ODD = " \t\r\n\v\f\0\x1c\x85\xa0\u2028\u3000019²٣_.,(){}'\"<>|¿\u017fßéÅn\u0301日々ーア・한😀\U0001d4b3\u0378\u1acf"
TEXTS = st.lists(st.one_of(st.text(st.sampled_from(ODD)), st.text(max_size=5), st.sampled_from(["def ", "12345"])))


@given(parts=TEXTS)
@example(["  ", "7 ", "\n", " \n 7"])
@example(["a\0\0b", " \0"])
def test_ids_are_those_of_the_library(any_tokenizer: ByteLevelBPE, parts: list[str]) -> None:
    text = "".join(parts)
    assert any_tokenizer.encode(text) == any_tokenizer._plain.encode(text, add_special_tokens=False).ids


def test_most_texts_go_by_words(any_tokenizer: ByteLevelBPE) -> None:
    assert any_tokenizer._words is not None
    for text in ("def f(x):\n    return x + 12345\n", "naïve Ελληνικά русский 日本語 한국어 😀 “quoted”"):
        assert any_tokenizer._words.encode(text) == any_tokenizer.encode(text)
    for text in ("a\0 b", "\u1acf"):
        assert any_tokenizer._words.encode(text) is None


@functools.cache
def sure_characters() -> str:
    every = "".join(chr(point) for point in range(sys.maxunicode + 1) if not 0xD800 <= point < 0xE000)
    return UNSURE.sub("", every)


@pytest.mark.parametrize("kind", [r"\p{L}", r"\p{M}", r"\p{N}", r"\p{P}", r"\p{S}", r"\s"])
def test_both_libraries_agree_on_every_character(kind: str) -> None:
    sure = sure_characters()
    assert len(sure) > 35_000
    removed = pre_tokenizers.Split(Regex(kind), "removed")
    for start in range(0, len(sure), 200):
        some = sure[start : start + 200]
        assert "".join(kept for kept, _ in removed.pre_tokenize_str(some)) == regex.sub(kind, "", some)


def test_a_copy_remembers_nothing(tokenizer: ByteLevelBPE) -> None:
    tokenizer.encode("remembered")
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy._words is not None
    assert not copy._words._ids
    assert copy.encode("remembered") == tokenizer.encode("remembered")


def test_what_is_remembered_is_bounded(tokenizer: ByteLevelBPE, monkeypatch: pytest.MonkeyPatch) -> None:
    assert REMEMBERED > 10_000
    monkeypatch.setattr("data.words.REMEMBERED", 3)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy._words is not None
    text = " ".join(f"word{'x' * i}" for i in range(50))
    assert copy.encode(text) == tokenizer.encode(text)
    assert len(copy._words._ids) == 3
    assert max(map(len, tokenizer._words._ids)) <= 32  # type: ignore[union-attr]


def test_another_way_to_split_is_left_to_the_library(tokenizer: ByteLevelBPE) -> None:
    content = tokenizer._content
    assert patterns_of(content) == KNOWN[0]
    splits = content["pre_tokenizer"]["pretokenizers"]
    for changed in (
        {"normalizer": {"type": "NFC"}},
        {"normalizer": {"type": "Sequence", "normalizers": [{"type": "NFC"}]}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": splits[1:]}},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [{**splits[0], "behavior": "Removed"}, *splits[1:]]}},
        {"model": {**content["model"], "dropout": 0.1}},
    ):
        assert patterns_of({**content, **changed}) is None
