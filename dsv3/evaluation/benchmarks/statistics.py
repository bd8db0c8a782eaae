"""Estimators: pass@k, bits per byte with its standard error, paired differences."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


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
    random = np.random.default_rng(seed)
    extreme = 1
    for start in range(0, draws, 1000):
        signs = random.integers(0, 2, size=(min(1000, draws - start), len(d)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ d / len(d)) >= abs(mean) - 1e-12).sum())
    return Paired(mean, stderr, extreme / (draws + 1))
