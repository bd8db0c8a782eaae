"""Editions: which documents an epoch renders differently, and that their text stays the same."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare

from data.edition import CHOICE, CUTS, DomainEdition, generator, joined_tokens, rearranged, slice_of
from data.fim import invert
from data.processes import Processes
from data.store import DomainTokens
from data.tokenizer import ByteLevelBPE
from tests.data.conftest import Make, training_texts

FIM = {"rate": 1.0, "order": "psm", "max_characters": 300}


def edition(make: Make, domain: str, epoch: int, **changes: Any) -> tuple[DomainEdition, DomainTokens]:
    prepared = make(**changes).prepared
    with Processes(1) as processes:
        made = prepared.edition(domain, epoch, processes=processes)
    assert made is not None
    return made, prepared.store.tokens(domain)


def documents_of(made: DomainEdition) -> list[list[int]]:
    starts = np.cumsum([0, *made.lengths])[:-1]
    return [slice_of(made.files, int(start), int(length)).tolist() for start, length in zip(starts, made.lengths)]


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_documents_are_chosen_at_the_rate(rate: float) -> None:
    counts = [rearranged("domain", epoch, 2000, rate).sum() for epoch in range(50)]
    observed = [sum(counts), 50 * 2000 - sum(counts)]
    assert chisquare(observed, [50 * 2000 * rate, 50 * 2000 * (1 - rate)]).pvalue > 0.001
    assert 0.5 < np.var(counts) / (2000 * rate * (1 - rate)) < 1.7  # binomial, not the same share every epoch


def test_choices_are_independent_of_the_number_of_documents_and_differ_between_epochs_and_domains() -> None:
    base = rearranged("a", 0, 1000, 0.5)
    assert (rearranged("a", 0, 10, 0.5) == base[:10]).all()
    for other in (rearranged("a", 1, 1000, 0.5), rearranged("b", 0, 1000, 0.5)):
        assert 400 < (other == base).sum() < 600


@pytest.mark.parametrize("change", [{"epoch": 1}, {"document": 6}, {"purpose": CHOICE}, {"domain": "b"}])
def test_draws_change_with_everything_they_depend_on(change: dict[str, Any]) -> None:
    base = {"domain": "a", "epoch": 0, "document": 5, "purpose": CUTS}
    assert generator(**base).random() != generator(**{**base, **change}).random()


def test_cuts_are_uniform_over_the_places_between_characters() -> None:
    counts = np.zeros(4)
    for document in range(4000):
        for cut in generator("a", 0, CUTS, document).integers(0, 3, size=2, endpoint=True):
            counts[cut] += 1
    assert chisquare(counts, [2000] * 4).pvalue > 0.001


def test_rearranged_documents_change_with_the_epoch_and_keep_their_text(make: Make) -> None:
    data = make(fim=FIM, split_punctuation_newline=0.0)
    texts = training_texts(data, "middle")
    editions = [
        documents_of(edition(make, "middle", epoch, fim=FIM, split_punctuation_newline=0.0)[0]) for epoch in (0, 1)
    ]
    for first, second, text in zip(*editions, texts, strict=True):
        assert first != second
        assert first[:2] == second[:2] == [data.tokenizer.bos, data.tokenizer.fim_begin]
        assert invert(first, tokenizer=data.tokenizer) == invert(second, tokenizer=data.tokenizer) == text


def test_seeds_share_an_edition(make: Make, tmp_path: Path) -> None:
    make(cache_dir=tmp_path, seed=1).setup()
    files = sorted((tmp_path / "editions").rglob("*.ids"))
    make(cache_dir=tmp_path, seed=2).setup()
    assert files == sorted((tmp_path / "editions").rglob("*.ids")) != []


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


def test_share_of_joined_tokens_is_split_and_no_byte_changes(make: Make, tokenizer: ByteLevelBPE) -> None:
    none = {"rate": 0.0, "order": "psm", "max_characters": None}
    joined = np.array(list(joined_tokens(tokenizer)))
    (first, stored), (second, _) = (
        edition(make, "long", epoch, fim=none, split_punctuation_newline=0.3) for epoch in (0, 1)
    )
    before = after = 0
    for number, (one, other) in enumerate(zip(documents_of(first), documents_of(second), strict=True)):
        plain = slice_of(stored.shards, int(stored.starts[number]), int(stored.lengths[number])).tolist()
        assert tokenizer.decode_bytes(one) == tokenizer.decode_bytes(other) == tokenizer.decode_bytes(plain)
        assert one != other
        before += int(np.isin(plain, joined).sum())
        after += int(np.isin(one, joined).sum())
    assert before > 1000
    assert abs(1 - after / before - 0.3) < 0.05


def test_where_nothing_is_rendered_there_is_no_edition(make: Make, tmp_path: Path) -> None:
    none = {"rate": 0.0, "order": "psm", "max_characters": None}
    prepared = make(cache_dir=tmp_path, fim=none, split_punctuation_newline=0.0).prepared
    with Processes(1) as processes:
        assert prepared.edition("short", 0, processes=processes) is None
    assert not (tmp_path / "editions").exists()


def test_two_processes_write_the_same_files_as_one(make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.edition.TASK", 2000)
    prepared = make().prepared
    found = []
    for count in (1, 2):
        alone = prepared._replace(settings=prepared.settings._replace(cache_dir=tmp_path / str(count)))
        with Processes(count) as processes:
            alone.edition("long", 0, processes=processes)
        files = sorted(alone.edition_folder("long", 0).iterdir())
        assert len(files) > 8
        found.append({file.name: file.read_bytes() for file in files})
    assert found[0] == found[1]


def test_killed_anywhere_the_edition_is_the_same_in_the_end(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.edition.TASK", 2000)
    prepared = make().prepared
    whole, killed = (
        prepared._replace(settings=prepared.settings._replace(cache_dir=tmp_path / name)) for name in ("a", "b")
    )

    def dies(tokens: int) -> None:
        raise KeyboardInterrupt

    deaths = 0
    with Processes(1) as processes:
        whole.edition("long", 0, processes=processes)
        while True:
            try:
                killed.edition("long", 0, processes=processes, progress=dies)
                break
            except KeyboardInterrupt:
                deaths += 1
    folders = [each.edition_folder("long", 0) for each in (whole, killed)]
    one, other = ({file.name: file.read_bytes() for file in folder.iterdir()} for folder in folders)
    assert deaths > 3
    assert one == other
