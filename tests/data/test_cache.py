"""The cache: whole or absent, and whoever comes first wins."""

from pathlib import Path

import pytest

from data.cache import cached, digest, number


def test_built_once(tmp_path: Path) -> None:
    calls = []

    def build(folder: Path) -> None:
        calls.append(folder)
        (folder / "file").write_text("content")

    for _ in range(2):
        path = cached(tmp_path / "kind", "key", "something", build)
        assert path == tmp_path / "kind" / "key"
        assert (path / "file").read_text() == "content"
    assert len(calls) == 1
    assert list((tmp_path / "kind").iterdir()) == [path]


def test_failed_building_leaves_nothing(tmp_path: Path) -> None:
    def build(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        cached(tmp_path, "key", "something", build)
    assert list(tmp_path.iterdir()) == []


def test_of_two_that_build_at_once_the_first_to_finish_wins(tmp_path: Path) -> None:
    def quicker(folder: Path) -> None:
        (folder / "file").write_text("first")

    def slower(folder: Path) -> None:
        cached(tmp_path, "key", "the same", quicker)
        (folder / "file").write_text("second")

    path = cached(tmp_path, "key", "something", slower)
    assert (path / "file").read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_digests_do_not_depend_on_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1}) != digest({"a": 2, "b": 1})


def test_numbers_are_64_bits_wide_and_fixed() -> None:
    assert number("a") == number("a") != number("b")
    assert max(number(str(i)) for i in range(1000)) > 2**63
    assert all(0 <= number(str(i)) < 2**64 for i in range(1000))
