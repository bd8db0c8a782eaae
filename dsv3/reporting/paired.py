"""Paired differences between two arms: confidence intervals, significance, minimum detectable effect.

With d_k the difference on seed k of n, s their standard deviation and t_p Student's quantile for n - 1 degrees:

    interval       mean(d) +- t_0.975 s / sqrt(n)      covers the true difference in 95% of studies
    detectable     (t_0.975 + t_0.8) s / sqrt(n)       minimum detectable effect: significant in 80% of
                                                       studies with this noise and n (77% for n = 3)
A difference is significant if the interval excludes zero. There is no correction for multiple testing.
"""

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import NamedTuple

CONFIDENCE, POWER = 0.95, 0.8


class Difference(NamedTuple):
    """Of an arm from the baseline, both trained with the same seeds."""

    seeds: int
    mean: float
    low: float  # of the interval; -inf where one seed leaves it open
    high: float
    detectable: float  # nan where all seeds differ by the same: nothing is known of the noise

    @property
    def significant(self) -> bool:
        return self.low > 0 or self.high < 0


def paired(arm: Sequence[float], baseline: Sequence[float]) -> Difference:
    """The two in the same order of seeds.

    Raises:
        ValueError: they are of different lengths, or empty.
    """
    differences = [a - b for a, b in zip(arm, baseline, strict=True)]
    if not differences:
        raise ValueError("no seed is finished in both arms")
    n, middle = len(differences), mean(differences)
    if n == 1:
        return Difference(1, middle, -math.inf, math.inf, math.inf)
    from scipy.stats import t

    error = stdev(differences) / math.sqrt(n)
    half = float(t.ppf((1 + CONFIDENCE) / 2, n - 1)) * error
    detectable = half + float(t.ppf(POWER, n - 1)) * error if error else math.nan
    return Difference(n, middle, middle - half, middle + half, detectable)
