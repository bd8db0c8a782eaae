"""Paired differences between two arms: confidence intervals, significance, minimum detectable effect.

With d_k the difference on seed k of n, s their standard deviation and t_p Student's quantile for n - 1 degrees:

    interval       mean(d) +- t_0.975 s / sqrt(n)      covers the true difference in 95% of studies
    detectable     (t_0.975 + t_0.8) s / sqrt(n)       minimum detectable effect: significant in 80% of
                                                       studies with this noise and n (77% for n = 3)
A difference is significant if the interval excludes zero. Where the half width D that comes from the choice of held-out
documents is known (`dsv3.reporting.documents`), it is added to the seeds' as the root of the sum of squares: the wider
of the two alone would cover the truth in 84% of studies where they are equal.

`adjusted` corrects p values for several comparisons by Holm's method; intervals are not corrected.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist, mean, stdev
from typing import NamedTuple

CONFIDENCE, POWER = 0.95, 0.8


class Difference(NamedTuple):
    """Of an arm from the baseline, both trained with the same seeds."""

    seeds: int
    mean: float
    low: float  # of the interval; -inf where one seed leaves it open
    high: float
    detectable: float  # nan where all seeds differ by the same: nothing is known of the noise
    p_value: float = math.nan  # of no difference; nan for one seed
    documents: float = 0.0  # half width that the documents alone give; 0 where unknown
    error: float = math.nan  # standard error over seeds
    settled: str = ""  # by the rule of `study.until`: a difference is shown, bounded, or "" while more seeds may come

    @property
    def significant(self) -> bool:
        return self.low > 0 or self.high < 0


def paired(arm: Sequence[float], baseline: Sequence[float], documents: float = 0.0) -> Difference:
    """The two in the same order of seeds. documents: half width by documents.

    Raises:
        ValueError: they are of different lengths, or empty.
    """
    differences = [a - b for a, b in zip(arm, baseline, strict=True)]
    if not differences:
        raise ValueError("no seed is finished in both arms")
    n, middle = len(differences), mean(differences)
    if n == 1:
        return Difference(1, middle, -math.inf, math.inf, math.inf)
    from scipy.special import stdtr, stdtrit  # Student's distribution and its quantiles

    error = stdev(differences) / math.sqrt(n)
    quantile = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2))
    half = math.hypot(quantile * error, documents)
    effect = detectable(quantile, error, n, documents)
    p_value = 2 * float(stdtr(n - 1, -statistic(middle, error, documents)))
    return Difference(n, middle, middle - half, middle + half, effect, p_value, documents, error)


def detectable(quantile: float, error: float, n: int, documents: float = 0.0) -> float:
    """Minimum detectable effect with n seeds of this standard error, where `quantile` is that of the interval."""
    from scipy.special import stdtrit

    normal = NormalDist().inv_cdf
    by_documents = documents * (1 + normal(POWER) / normal((1 + CONFIDENCE) / 2))
    return math.hypot((quantile + float(stdtrit(n - 1, POWER))) * error, by_documents) or math.nan


def statistic(mean: float, error: float, documents: float) -> float:
    """The quantile at which an interval, of hypot(quantile * error, documents) on both sides, just excludes zero."""
    beyond = math.sqrt(max(0.0, mean**2 - documents**2))
    return beyond / error if error else (math.inf if beyond else 0.0)


def adjusted(p_values: Sequence[float]) -> list[float]:
    """Holm's: the i-th smallest of m times m - i, from i = 0, and none below a smaller one's."""
    found, highest = [math.nan] * len(p_values), 0.0
    order = sorted((p, i) for i, p in enumerate(p_values) if not math.isnan(p))
    for rank, (p, i) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - rank)))
        found[i] = highest
    return found
