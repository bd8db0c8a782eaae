"""The survey: what is held out before anything is tokenised."""

import itertools
import random
import time
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import smallest
from data import survey as module
from data.documents import PIECE, Document, HeldOut, LeftOut, pieces
from data.sources import Source
from data.spool import documents
from data.survey import Survey, read_survey, survey
from tests.data.conftest import words


def source_of(found: Sequence[Document | LeftOut], *, in_files: bool = True) -> Source:
    def yielded() -> Iterator[Document | LeftOut]:
        for each in found:  # parts of a text can be read once
            yield (
                each if isinstance(each, LeftOut) or isinstance(each.text, str) else each._replace(text=iter(each.text))
            )

    return Source(weight=1.0, identity=dict, documents=yielded, size=(lambda: 1) if in_files else None)


def surveyed(folder: Path, *of_domains: Sequence[Document | LeftOut], **changes: Any) -> Survey:
    settings = {"share": 0.1, "held_out_bytes": 10**6, "longest": 10**6, **changes}
    place = folder / str(len(list(folder.iterdir())))
    place.mkdir()
    survey({chr(97 + i): source_of(found) for i, found in enumerate(of_domains)}, place, **settings)
    return read_survey(place)


def many(count: int, first: int = 0, **fields: Any) -> list[Document]:
    return [Document(f"{first + i}", words(seed=first + i, count=40), **fields) for i in range(count)]


def names(found: Survey, domain: str = "a") -> list[str]:
    return [document.name for document in found.held_out(domain)]


def test_about_the_share_of_documents_is_held_out(tmp_path: Path) -> None:
    found = surveyed(tmp_path, many(1000))
    assert 60 < len(names(found)) < 145
    assert found.domains["a"].held_out == sorted(int(name) for name in names(found))


def test_the_choice_depends_on_the_text_alone(tmp_path: Path) -> None:
    given = many(300)
    whole = names(surveyed(tmp_path, given))
    shuffled = random.Random(1).sample(given, len(given))
    assert names(surveyed(tmp_path, shuffled)) == whole != sorted(whole, key=int)
    assert set(names(surveyed(tmp_path, given[:150]))) == set(whole) & {str(i) for i in range(150)}
    renamed = [document._replace(name=f"x{document.name}") for document in given]
    assert [name[1:] for name in names(surveyed(tmp_path, renamed))] == whole


def test_groups_are_held_out_together(tmp_path: Path) -> None:
    given = [document._replace(group=f"g{i // 5}") for i, document in enumerate(many(300))]
    held_out = names(surveyed(tmp_path, given))
    groups = {int(name) // 5 for name in held_out}
    assert len(held_out) == 5 * len(groups) > 0


def test_where_the_share_gives_none_the_smallest_hash_is_held_out(tmp_path: Path) -> None:
    given = many(20)
    (only,) = names(surveyed(tmp_path, given, share=1e-9))
    assert names(surveyed(tmp_path, given, share=0.9))[0] == only
    grouped = [document._replace(group=f"g{i % 4}") for i, document in enumerate(given)]
    assert len(names(surveyed(tmp_path, grouped, share=1e-9))) == 5


@given(seed=st.integers(0, 1000), limit=st.integers(500, 20_000))
def test_no_more_than_the_limit_is_held_out_in_whatever_order(
    tmp_path_factory: pytest.TempPathFactory, seed: int, limit: int
) -> None:
    folder = tmp_path_factory.mktemp("survey")
    draw = random.Random(seed)
    given = [Document(str(i), words(seed=i, count=draw.randint(5, 80))) for i in range(40)]
    first = surveyed(folder, given, share=0.8, held_out_bytes=limit)
    assert first.domains["a"].held_out_bytes <= limit
    shuffled = draw.sample(given, len(given))
    second = surveyed(folder, shuffled, share=0.8, held_out_bytes=limit)
    assert names(first) == names(second)
    assert first.sample("a") == second.sample("a")


def test_a_source_may_decide_itself(tmp_path: Path) -> None:
    given = [document._replace(held_out=i % 10 == 0) for i, document in enumerate(many(100))]
    assert sorted(map(int, names(surveyed(tmp_path, given, share=0.9)))) == list(range(0, 100, 10))


def test_what_a_source_holds_out_beyond_the_limit_is_not_trained_on_either(tmp_path: Path) -> None:
    given = [document._replace(held_out=i < 10) for i, document in enumerate(many(20))]
    size = len(given[0].text.encode()) + len(given[1].text.encode())  # type: ignore[union-attr]
    found = surveyed(tmp_path, given, held_out_bytes=size).domains["a"]
    assert found.held_out == [0, 1]
    assert set(found.beyond) == set(range(2, 10)) - set(found.held_out)


def test_equal_held_out_texts_are_kept_once(tmp_path: Path) -> None:
    given = [Document(str(i), "the same text", held_out=True) for i in range(3)] + many(3, first=10)
    assert names(surveyed(tmp_path, given))[0] == "0"
    assert surveyed(tmp_path, given).domains["a"].held_out[:3] == [0, 1, 2]


def test_blank_and_too_long_documents_have_no_number(tmp_path: Path) -> None:
    given = [Document("blank", " \n"), Document("long", "x" * 501), *many(4), LeftOut("b.png", "binary")]
    found = surveyed(tmp_path, given, longest=500, held_out_bytes=2000).domains["a"]
    assert (found.documents, found.empty) == (4, 1)
    assert found.left_out == {"too long": 1, "binary": 1}
    assert [name for name, _ in found.left_out_names] == ["long", "b.png"]
    assert max(found.held_out) < 4


def test_one_document_holds_out_its_end(tmp_path: Path) -> None:
    text = "".join(f"a line of text, number {i}\n" for i in range(1000))
    found = surveyed(tmp_path, [Document("input.txt", text)])
    split = found.domains["a"].split_at
    assert split is not None
    assert found.domains["a"].held_out == []
    (end,) = found.held_out("a")
    assert text[:split] + end.text == text
    assert text[split - 1] == "\n"
    assert 0.08 < len(end.text) / len(text) < 0.1
    assert found.sample("a") == [text[:split]]


def test_something_is_always_left_to_train_on(tmp_path: Path) -> None:
    """Also if every document's hash is below the share."""
    found = surveyed(tmp_path, many(3), share=1 - 1e-9)
    assert len(names(found)) == 2
    assert len(found.sample("a")) == 1
    one_group = [document._replace(group="g") for document in many(3)]
    with pytest.raises(ValueError, match="no training documents"):
        surveyed(tmp_path, one_group, share=1 - 1e-9)


def test_the_end_of_one_long_line_is_held_out_too(tmp_path: Path) -> None:
    found = surveyed(tmp_path, [Document("input.txt", "word " * 1000)])
    (end,) = found.held_out("a")
    assert len(end.text) == 500


def test_the_end_of_one_document_is_no_longer_than_the_limit(tmp_path: Path) -> None:
    text = "".join(f"a line of text, number {i}\n" for i in range(1000))
    (end,) = surveyed(tmp_path, [Document("input.txt", text)], share=0.5, held_out_bytes=1000).held_out("a")
    assert 900 < len(end.text.encode()) <= 1000
    text = "a line of text\n" * 1000 + "日本語の文\n" * 1000  # its end has more bytes per character
    found = surveyed(tmp_path, [Document("input.txt", text)], share=0.5, held_out_bytes=1000)
    (end,) = found.held_out("a")
    assert 900 < len(end.text.encode()) <= 1000
    assert text[: found.domains["a"].split_at] + end.text == text


@given(seed=st.integers(0, 1000))
def test_a_groups_texts_are_sampled_in_whatever_order(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    folder = tmp_path_factory.mktemp("survey")
    draw = random.Random(seed)
    given = [Document(str(i), words(seed=i, count=draw.randint(5, 80)), group=f"g{i % 3}") for i in range(12)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "SAMPLE", 1000)
        one, other = (surveyed(folder, texts) for texts in (given, draw.sample(given, len(given))))
    assert sorted(names(one)) == sorted(names(other))
    assert one.sample("a") == other.sample("a")


def test_no_more_than_the_limit_is_held_out_of_a_source_that_decides_in_part(tmp_path: Path) -> None:
    given = [document._replace(held_out=True if i < 10 else None) for i, document in enumerate(many(60))]
    of_source = sum(len(str(document.text).encode()) for document in given[:10])
    found = surveyed(tmp_path, given, share=0.9, held_out_bytes=of_source + 1000)
    assert of_source < found.domains["a"].held_out_bytes <= of_source + 1000
    assert set(range(10)) < set(found.domains["a"].held_out)


def test_what_a_source_holds_out_stays_held_out_where_all_else_would_be_too(tmp_path: Path) -> None:
    for seed in range(10):
        given = [document._replace(held_out=True if i < 5 else None) for i, document in enumerate(many(8, 10 * seed))]
        found = surveyed(tmp_path, given, share=1 - 1e-9).domains["a"]
        assert set(range(5)) < set(found.held_out)
        assert len(found.held_out) == 7


def test_a_group_larger_than_the_limit_is_trained_on(tmp_path: Path) -> None:
    given = [document._replace(group="large" if i % 2 else f"g{i}") for i, document in enumerate(many(60))]
    large = [str(document.text) for document in given if document.group == "large"]
    limit = sum(len(text.encode()) for text in large) - 1
    for share in (0.9, 1e-9):
        found = surveyed(tmp_path, given, share=share, held_out_bytes=limit)
        assert 0 < found.domains["a"].held_out_bytes <= limit
    only = [document._replace(group=f"g{i % 2}") for i, document in enumerate(many(60))]
    with pytest.raises(ValueError, match=r"of its 60 documents: none, or no group of them, has at most"):
        surveyed(tmp_path, only, held_out_bytes=2500)


@pytest.mark.slow
def test_drawing_takes_time_in_proportion_to_the_documents() -> None:
    """Of many small ones, far more than the limit: each that goes takes no look at all others."""

    def seconds(count: int) -> float:
        source = random.Random(1)
        given = [smallest.Kept(source.getrandbits(64), i, 1, HeldOut("", "", "", "")) for i in range(count)]
        drawn = smallest.Smallest(limit=count // 4)
        started = time.process_time()
        for kept in given:
            drawn.add(kept)
        taken = time.process_time() - started
        assert sorted(drawn.kept) == sorted(given)[: count // 4]
        return taken

    assert min(seconds(160_000) for _ in range(2)) < 30 * seconds(20_000)  # 64 times where each looks at all


@pytest.mark.parametrize("count", [1, 30])
@pytest.mark.parametrize(("limit", "size"), [(10**6, 10**7), (1500, 10**7), (1500, 1400)])
def test_a_text_in_parts_counts_as_the_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, limit: int, size: int
) -> None:
    """Also where a text is longer than what is kept of it, and where characters are longer than a byte."""
    monkeypatch.setattr(module, "SAMPLE", size)
    monkeypatch.setattr(smallest, "SAMPLE", size)
    texts = [words(seed=i, count=40) + "日本語の文\n" * 15 * i for i in range(count)]
    whole = [Document(f"{i}", text) for i, text in enumerate(texts)]
    parts = [
        document._replace(text=[document.text[i : i + 7] for i in range(0, len(document.text), 7)])  # type: ignore
        for document in whole
    ]
    one, other = (surveyed(tmp_path, texts, share=0.3, held_out_bytes=limit) for texts in (whole, parts))
    assert one.domains == other.domains
    assert one.held_out("a") == other.held_out("a")
    assert one.sample("a") == other.sample("a")


def test_a_domain_without_text_or_room_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.sources\.a: it gives no text \(1 binary left out\)"):
        surveyed(tmp_path, [Document("a", ""), LeftOut("b", "binary")])
    with pytest.raises(ValueError, match=r"data\.sources\.b: nothing .* of its 5 documents.*data\.held_out_bytes=10 "):
        surveyed(tmp_path, [Document("x", "ab"), Document("y", "cd")], many(5), held_out_bytes=10)
    with pytest.raises(ValueError, match=r"data\.sources\.a: it gives no training documents"):
        surveyed(tmp_path, many(3, held_out=True))
    with pytest.raises(ValueError, match=r"data\.sources\.a: it holds out none of its 3 documents"):
        surveyed(tmp_path, many(3, held_out=False))
    with pytest.raises(ValueError, match=r"data\.sources\.a: .* its only document: it is too short"):
        surveyed(tmp_path, [Document("x", "a")])


def test_the_sample_is_of_training_text_and_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = many(200)
    monkeypatch.setattr(module, "SAMPLE", 5000)
    monkeypatch.setattr(smallest, "SAMPLE", 5000)
    found = surveyed(tmp_path, given)
    sample = found.sample("a")
    assert sum(map(len, sample)) == 5000
    assert not set(sample) & {document.text for document in found.held_out("a")}
    assert all(any(document.text.startswith(text) for document in given) for text in sample)  # type: ignore[union-attr]


def test_what_is_made_is_made_once(tmp_path: Path) -> None:
    calls = []

    def made() -> Iterator[Document]:
        calls.append(1)
        yield from many(10, held_out=None, family="f", answer="7")

    source = Source(weight=1.0, identity=dict, documents=made)
    survey({"a": source}, tmp_path, share=0.3, held_out_bytes=10**6, longest=10**6)
    assert list(documents(source, tmp_path, "a")) == many(10, family="f", answer="7")
    assert len(calls) == 1


def test_the_most_frequent_training_answer_of_each_family(tmp_path: Path) -> None:
    answers = ["1", "2", "2", "3", "3", "3"]
    given = [
        Document(f"{i}", f"question {i}: {a}", i == 5 or None, family="f", answer=a) for i, a in enumerate(answers)
    ]
    decided = [document._replace(held_out=bool(document.held_out)) for document in given]
    found = surveyed(tmp_path, [*decided, Document("x", "question x: 2", False, family="f", answer="2")])
    assert found.domains["a"].majority == {"f": "2"}


@given(lines=st.lists(st.text("ab1 é", max_size=12), max_size=40), step=st.integers(1, 9))
def test_pieces_are_consecutive_and_do_not_depend_on_the_parts(lines: list[str], step: int) -> None:
    text = "\n".join(lines)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.documents.PIECE", 10)
        found = list(pieces(text))
        assert found == list(pieces(text[i : i + step] for i in range(0, len(text), step)))
    assert "".join(found) == text
    assert all(0 < len(piece) <= 10 for piece in found)
    for piece, following in itertools.pairwise(found):
        inside = any(a == "\n" and b.isalpha() for a, b in zip(piece, (piece + following)[1:], strict=False))
        assert (piece[-1] == "\n" and following[0].isalpha()) or not inside
    assert PIECE == 1_000_000


def test_a_long_string_is_read_without_a_copy_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """As UTF-8 it would take as much again."""
    monkeypatch.setattr(module, "SAMPLE", 1000)
    monkeypatch.setattr(smallest, "SAMPLE", 1000)
    reading = module._Reading(share=0.1, held_out_bytes=1000, longest=10**8)
    text = words(seed=1, count=1000) * 3000
    tracemalloc.start()
    size = reading.take(Document("long", text))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size == len(text.encode()) > 10**7
    assert peak < size / 2
