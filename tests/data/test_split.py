"""Nothing held out is known from training."""

import math
import random
from collections.abc import Sequence

import pytest

from data.split import Document, lines_of, split
from tests.data.conftest import words


def documents(texts: Sequence[str], domain: str = "a") -> list[Document]:
    return [Document(domain, f"{domain}{i}", text) for i, text in enumerate(texts)]


def held_out(found: Sequence[Document]) -> list[Document]:
    return [document for document in found if document.held_out]


def overlap(text: str, other: str) -> float:
    return len(lines_of(text) & lines_of(other)) / max(1, len(lines_of(text)))


def test_share_of_every_domain_is_held_out() -> None:
    texts = {name: [words(seed=hash((name, i)) % 10**6, count=100) for i in range(size)] for name, size in
             {"a": 50, "b": 7, "c": 2}.items()}  # fmt: skip
    found = split([d for name, of_domain in texts.items() for d in documents(of_domain, name)], share=0.1)
    for name, of_domain in texts.items():
        assert sum(d.domain == name for d in held_out(found)) == math.ceil(0.1 * len(of_domain))


def test_groups_are_held_out_together() -> None:
    given = [
        Document("a", f"{file}:{part}", words(seed=10 * file + part, count=60), group=f"{file}")
        for file in range(30)
        for part in range(5)
    ]
    groups = [d.group for d in held_out(split(given, share=0.1))]
    assert len(groups) == 15
    assert len(set(groups)) == 3


def test_split_and_order_depend_on_names_alone() -> None:
    given = documents([words(seed=i, count=100) for i in range(40)])
    shuffled = random.Random(1).sample(given, len(given))
    assert split(given, share=0.2) == split(shuffled, share=0.2)
    assert [d.name for d in split(given, share=0.2)] != [d.name for d in given]


def test_equal_texts_are_kept_once_even_across_domains() -> None:
    given = [*documents(["same text\n", "other text\n", "same text\n"]), *documents(["same text\n", "third\n"], "b")]
    assert sorted(d.text for d in split(given, share=0.4)) == ["other text\n", "same text\n", "third\n"]


def test_of_equal_texts_the_held_out_one_is_kept() -> None:
    given = [Document("a", "1", "same", held_out=False), Document("a", "2", "same", held_out=True)]
    assert [d.held_out for d in split(given, share=0.1)] == [True]


def test_blank_documents_are_dropped() -> None:
    assert [d.text for d in split(documents(["", " \n", "text"]), share=0.5)] == ["text"]


@pytest.mark.parametrize("seed", range(20))
def test_no_held_out_text_half_repeats_a_training_text(seed: int) -> None:
    """Families of files that share many lines, as tables of character sets do; some form chains."""
    source = random.Random(seed)
    pool = [f"a telling line number {i}" for i in range(40)]
    texts = ["\n".join(source.sample(pool, source.randint(3, 15))) for _ in range(60)]
    texts += [words(seed=1000 * seed + i, count=150) for i in range(40)]
    found = split(documents(texts), share=0.3)
    training = [d.text for d in found if not d.held_out]
    assert held_out(found)
    for document in held_out(found):
        assert max(overlap(document.text, text) for text in training) < 0.5


def test_near_duplicate_goes_to_training() -> None:
    body = "\n".join(f"an entry of a long table, number {i}" for i in range(50))
    texts = [f"{body}\nvariant number {i} of the same table" for i in range(20)]
    assert not held_out(split(documents(texts), share=0.3))


def test_near_duplicates_are_found_across_domains() -> None:
    body = "\n".join(f"an entry of a long table, number {i}" for i in range(50))
    decided = Document("a", "copy", body, held_out=False)
    found = split([decided, *documents([f"{body}\nvariant number {i}" for i in range(5)], "b")], share=0.2)
    assert not held_out(found)
