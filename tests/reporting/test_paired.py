"""Paired differences against scipy's paired t-test, and the verdicts against simulation."""

import math
import random

import pytest
from scipy.stats import t, ttest_rel

from dsv3.reporting.paired import paired


@pytest.mark.parametrize("seed", range(5))
def test_interval_is_that_of_the_paired_t_test(seed: int) -> None:
    draw = random.Random(seed)
    ours, theirs = ([draw.gauss(2, 1) for _ in range(2 + seed)] for _ in range(2))
    expected = ttest_rel(ours, theirs).confidence_interval(0.95)
    difference = paired(ours, theirs)
    assert (difference.low, difference.high) == pytest.approx((expected.low, expected.high))
    assert difference.significant == (ttest_rel(ours, theirs).pvalue < 0.05)


@pytest.mark.parametrize(("n", "least", "most"), [(3, 0.74, 0.80), pytest.param(8, 0.75, 0.87, marks=pytest.mark.slow)])
def test_a_difference_of_the_detectable_size_is_significant_in_about_four_studies_of_five(
    n: int, least: float, most: float
) -> None:
    """With n seeds and noise 1: (t_0.975 + t_0.8) / sqrt(n), exact for many seeds."""
    draw = random.Random(0)
    studies = [[draw.gauss(0, 1) for _ in range(n)] for _ in range(3000)]
    detectable = (t.ppf(0.975, n - 1) + t.ppf(0.8, n - 1)) / math.sqrt(n)
    shown = sum(paired([d + detectable for d in study], [0.0] * n).significant for study in studies) / len(studies)
    assert least < shown < most
    squares = [paired(study, [0.0] * n).detectable ** 2 for study in studies]
    assert math.sqrt(sum(squares) / len(squares)) == pytest.approx(detectable, rel=0.05)


def test_pairing_removes_what_the_seeds_share() -> None:
    shared = [1.0, 3.0, 8.0]
    difference = paired([x - 0.1 for x in shared], shared)
    assert difference.mean == pytest.approx(-0.1)
    assert difference.high - difference.low == pytest.approx(0.0, abs=1e-12)
    assert difference.significant


def test_nothing_to_compare() -> None:
    with pytest.raises(ValueError, match="no seed is finished in both arms"):
        paired([], [])
