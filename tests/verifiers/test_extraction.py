"""Final answers and programs, found in texts."""

import doctest
import time

import pytest

import dsv3.verifiers.extraction
from dsv3.verifiers import boxed, boxed_integer, program


def test_the_examples_in_its_docstrings() -> None:
    failed, tried = doctest.testmod(dsv3.verifiers.extraction)
    assert (failed, tried > 0) == (0, True)


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{a{b}{c}}", "a{b}{c}"),
        (r"\boxed{ \{1, 2\} }", r"\{1, 2\}"),
        (r"\\ \boxed{1} and \boxed{ 1 }", "1"),
        (r"\boxed{\boxed{1}}", r"\boxed{1}"),
        (r"{\boxed{1}}", "1"),
        (r"\boxed{1} \boxed{2}", None),
        (r"\boxed{1} \boxed{1", None),
        (r"\boxed{1\}", None),
        (r"\boxed{", None),
        ("boxed{1}", None),
        ("", None),
    ],
)
def test_boxes(text: str, content: str | None) -> None:
    assert boxed(text) == content


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (r"\boxed{-007}", -7),
        (r"\boxed{7} \boxed{+07}", 7),
        (r"\boxed{7} \boxed{}", None),
        (r"\boxed{\boxed{7}}", None),
        (r"\boxed{1,000}", None),
        (r"\boxed{1_000}", None),
        (r"\boxed{" + "\u0667}", None),  # a digit, though no ASCII one
        (r"\boxed{" + "9" * 1001 + "}", None),
        ("7", None),
    ],
)
def test_boxed_integers(text: str, value: int | None) -> None:
    assert boxed_integer(text) == value


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("x = 1\n", "x = 1\n"),
        ("Here:\n```python\nx = 1\n\ny = 2\n```\nDone.", "x = 1\n\ny = 2"),
        ("```\n```", ""),
        ("```\nx = 1", None),
        ("```\nx = 1\n```\n```\nx = 2\n```", None),
    ],
)
def test_programs(text: str, code: str | None) -> None:
    assert program(text) == code


def test_long_texts_take_no_longer_than_their_length() -> None:
    started = time.process_time()
    for text in (r"\boxed{" * 100_000, r"\boxed " * 100_000, "{" * 500_000, "```\n" * 200_000, "```x\n" * 200_000):
        assert boxed(text) is boxed_integer(text) is None
        program(text)
    assert time.process_time() - started < 10
