"""Estimators: pass@k, intervals of accuracies, bits per byte with its standard error, paired differences."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): unbiased for the chance that one of k samples is right (arXiv 2107.03374, eq. 1).

    Raises:
        ValueError: there are fewer than k samples.
    """
    if samples < k:
        raise ValueError(f"pass@{k} cannot be estimated from {samples} samples")
    return 1.0 - math.comb(samples - correct, k) / math.comb(samples, k)


class Estimate(NamedTuple):
    value: float
    stderr: float  # NaN where it cannot be estimated


def mean_estimate(values: Sequence[float]) -> Estimate:
    """Mean and its standard error, s / sqrt(n)."""
    x = np.asarray(values, dtype=np.float64)
    return Estimate(float(x.mean()), float(x.std(ddof=1) / math.sqrt(len(x))) if len(x) > 1 else math.nan)


def ratio_estimate(numerators: Sequence[float], denominators: Sequence[float]) -> Estimate:
    """sum a / sum b over documents, and its standard error by linearisation.

    se^2 = n / (n - 1) * sum (a_i - r b_i)^2 / (sum b)^2
    """
    a, b = np.asarray(numerators, dtype=np.float64), np.asarray(denominators, dtype=np.float64)
    ratio = float(a.sum() / b.sum())
    n = len(a)
    if n < 2:
        return Estimate(ratio, math.nan)
    residuals = a - ratio * b
    return Estimate(ratio, float(math.sqrt(n / (n - 1) * (residuals**2).sum()) / b.sum()))


class Interval(NamedTuple):
    low: float
    high: float


def clopper_pearson(correct: int, n: int, confidence: float = CONFIDENCE) -> Interval:
    """Exact interval of an accuracy of `correct` out of n (Clopper and Pearson, 1934).

    At its ends, as many correct answers or more, and as many or fewer, have the probability (1 - confidence) / 2. It
    has a width for 0 and n correct answers too, where the standard error is 0.
    """
    from scipy.stats import beta

    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, correct, n - correct + 1)) if correct else 0.0
    high = float(beta.ppf(1 - tail, correct + 1, n - correct)) if correct < n else 1.0
    return Interval(low, high)


def accuracy_interval(value: float, stderr: float, n: int) -> Interval | None:
    """`clopper_pearson` of a mean over n documents that score 1 or 0 each; None for any other mean.

    Among scores from 0 to 1 with a given mean, only 0 and 1 have the variance mean * (1 - mean): the standard error
    tells them apart.
    """
    if n < 2 or not 0 <= value <= 1:
        return None
    correct = round(value * n)
    expected = math.sqrt(correct / n * (1 - correct / n) / (n - 1))
    binary = math.isclose(value, correct / n, abs_tol=1e-9) and math.isclose(stderr, expected, abs_tol=1e-9)
    return clopper_pearson(correct, n) if binary else None


def uncertainty(value: float, stderr: float | None, n: int) -> str:
    """What tables show next to a score: the interval of an accuracy, the standard error of any other score."""
    if stderr is None or math.isnan(stderr):
        return ""
    interval = accuracy_interval(value, stderr, n)
    return f"± {stderr:.2g}" if interval is None else f"[{interval.low:.3f}, {interval.high:.3f}]"


def share_text(correct: int, n: int) -> str:
    """An accuracy with its exact interval, in per cent."""
    low, high = clopper_pearson(correct, n)
    return f"{correct / n:.0%} [{100 * low:.0f}, {100 * high:.0f}]"


class Paired(NamedTuple):
    """How two models differ on the same documents."""

    difference: float  # second minus first
    stderr: float
    p: float  # two-sided, by flipping signs


def paired_difference(first: Sequence[float], second: Sequence[float], *, draws: int = 10_000, seed: int = 0) -> Paired:
    """Mean of the differences d, se = s_d / sqrt(n), and the share of random sign flips of d whose mean is as large.

    The observed signs count as one draw more, so p is never 0. Values that are sums of one document each, such as
    bits, may be given already divided by the mean of their denominators.
    """
    d = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    mean, stderr = mean_estimate(d.tolist())
    random = np.random.default_rng(
        seed
    )  # scipy's permutation_test draws others (its p differs), for ten times the CPU time
    extreme = 1
    for start in range(0, draws, 1000):
        signs = random.integers(0, 2, size=(min(1000, draws - start), len(d)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ d / len(d)) >= abs(mean) - 1e-12).sum())
    return Paired(mean, stderr, extreme / (draws + 1))


def paired_accuracy_interval(first: Sequence[float], second: Sequence[float]) -> Interval | None:
    """Interval of the difference of two accuracies on the same documents; None unless every score is 0 or 1.

    The difference is P(only the second is correct) - P(only the first is). Exact intervals of the two, each with half
    of the error probability, hold together: a conservative interval, with a width where no document differs too.
    """
    if not {*first, *second} <= {0, 1}:
        return None
    pairs = list(zip(first, second, strict=True))
    gained, lost = (clopper_pearson(pairs.count(kind), len(pairs), (1 + CONFIDENCE) / 2) for kind in ((0, 1), (1, 0)))
    return Interval(gained.low - lost.high, gained.high - lost.low)
