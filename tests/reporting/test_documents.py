"""Errors by held-out documents: against formulas, and what runs without them have."""

import math
from pathlib import Path

import numpy as np
import pytest

from dsv3.reporting.documents import Documents, differing_by_document, half_widths
from dsv3.reporting.history import History
from dsv3.reporting.study_results import headline, read_study
from tests.reporting.test_study_results import made


def drawn(n: int, *, seeds: int = 3, noise: float = 0.0) -> Documents:
    draw = np.random.default_rng(0)
    shared, own = draw.normal(0, 30, n), draw.normal(0, noise, (seeds, n))
    return Documents(shared + own, np.full(n, 1000), np.array(["text"] * n))


def test_documents_of_one_size_give_the_interval_of_their_mean() -> None:
    from scipy.stats import t

    documents = drawn(200)
    expected = t.ppf(0.975, 199) * documents.bits_KD[0].std(ddof=1) / math.sqrt(200) / 1000
    assert half_widths(documents) == pytest.approx([expected] * 3, rel=0.07)


def test_more_seeds_take_away_what_is_not_shared() -> None:
    first, *_, last = half_widths(drawn(200, seeds=20, noise=90.0))
    assert last < 0.6 * first
    assert last > 0.8 * half_widths(drawn(200))[0]


def test_domains_are_drawn_from_by_themselves() -> None:
    """What two domains differ by is no error: their shares of the text are fixed."""
    bits = np.concatenate([np.full(20, 100.0), np.full(5, -400.0)])[None]
    documents = Documents(bits, np.full(25, 10), np.array(["a"] * 20 + ["b"] * 5))
    assert half_widths(documents) == pytest.approx([0.0])
    assert half_widths(documents._replace(domains_D=np.array(["a"] * 25)))[0] > 1


def test_a_single_document_tells_nothing_of_its_error() -> None:
    assert half_widths(Documents(np.ones((2, 1)), np.ones(1), np.array(["a"]))).tolist() == [0.0, 0.0]


def run_with_documents(root: Path, arm: str, seed: int, nats: list[float], n_bytes: int = 10) -> History:
    made(root, arm, seed)
    history = History(root / arm / f"seed{seed}", arm)
    for number, value in enumerate(nats):
        row = {"tokens": 100, "weights": "live", "document": number, "domain": "all", "nats": value, "bytes": n_bytes}
        history.folder.table("metrics/documents").append(row)
    history.folder.flush(100)
    return history


def test_runs_are_compared_on_the_documents_that_they_share(tmp_path: Path) -> None:
    one = run_with_documents(tmp_path, "a", 1, [1.0, 2.0])
    other = run_with_documents(tmp_path, "b", 1, [2.0, 2.0])
    third = run_with_documents(tmp_path, "c", 1, [2.0, 2.0], n_bytes=11)
    found = differing_by_document([other], [one], weights="live", domain="all")
    assert found is not None
    assert found.bits_KD * math.log(2) == pytest.approx(np.array([[1.0, 0.0]]))
    assert differing_by_document([third], [one], weights="live", domain="all") is None
    assert differing_by_document([one], [other], weights="ema", domain="all") is None


def test_the_verdicts_interval_has_both_errors(tmp_path: Path) -> None:
    for seed in (1, 2):
        run_with_documents(tmp_path, "a", seed, [1.0, 2.0, 3.0])
        run_with_documents(tmp_path, "b", seed, [1.0, 2.5, 3.0])
    study = read_study(tmp_path)
    difference = study.difference(headline(study), "b")
    assert difference is not None
    assert difference.documents > 0
    assert difference.high == pytest.approx(difference.documents), "seeds do not differ"
