"""Sequential rule of `study.until`: after how many seeds a pair of arms is settled, and its interval then.

With d_1 ... d_n the paired differences of the first n seeds, s_n their standard deviation, D_n the half width that the
held-out documents alone give (`dsv3.reporting.documents`), and N = `most_seeds`, there is a look after each seed from
the `FIRST_LOOK`-th on, and at each

    difference shown    |mean(d)| > hypot(c_n s_n / sqrt(n), D_n)           the pair is settled
    bounded             hypot(w_n s_n / sqrt(n), D_n) <= `half_width`       the pair is settled

The three quantiles are Student's t for repeated looks. Without a difference, a share `SPENT` (n / N)^1.5 of all studies
crosses a c_n by look n (Lan and DeMets' spending of alpha, by Kim and DeMets' power function). e_n is the quantile of
a look that is known to be the last, and spends the rest of `SPENT`. w_n spends `ON_WIDTH` of `SPENT` instead: it is
wider, because looks at which s_n is small by chance are where a study stops. For n = N all three are one. Student's t
over few seeds has no closed form for this, so they are read off simulated studies of a fixed seed.

The interval is mean(d) +- hypot(q s_n / sqrt(n), D_n), with q = w_n where the pair is bounded and e_n elsewhere. Its
coverage follows from no theorem; tests/reporting/test_sequential.py measures it for differences from 0 to 4 s.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from dsv3.reporting.paired import Difference, detectable, paired, statistic

ALPHA = 0.05
SPENT = 0.045  # of alpha, by repeated looks; the rest is for choosing n by the width
ON_WIDTH = 0.7
FIRST_LOOK = 4  # seeds; with fewer, quantiles for repeated looks are too wide to show anything
MOST_SEEDS = 12  # up to which false verdicts stay below alpha at every half width
SPENDING = 1.5  # exponent: between stopping early and losing no power at the last look
STUDIES = 200_000  # simulated


class Look(NamedTuple):
    """Quantiles at the look after one number of seeds."""

    cross: float  # c_n
    last: float  # e_n
    width: float  # w_n
    spent: float  # share of studies without a difference that have crossed before
    statistics: np.ndarray  # |t| of the others, ascending

    def p_value(self, statistic: float) -> float:
        """Probability, without a difference, of crossing before this look or of a |t| above this at it.

        Scaled so that a pair is significant where it is at most ALPHA.
        """
        larger = len(self.statistics) - np.searchsorted(self.statistics, statistic, side="right")
        return float(min(1.0, (self.spent + larger / STUDIES) * ALPHA / SPENT))


@cache
def looks(most: int) -> dict[int, Look]:
    """Number of seeds -> its look, for a study of at most `most` seeds, 2 to MOST_SEEDS."""
    draw = np.random.default_rng(0)
    sums, squares = np.zeros(STUDIES), np.zeros(STUDIES)
    going = np.ones(STUDIES, dtype=bool)
    found: dict[int, Look] = {}
    for n in range(1, most + 1):
        values = draw.standard_normal(STUDIES)
        sums += values
        squares += values * values
        if n < min(FIRST_LOOK, most):
            continue
        statistics = np.abs(sums) / np.sqrt((squares - sums * sums / n) * n / (n - 1))
        ordered = np.sort(statistics[going])
        spent = 1 - len(ordered) / STUDIES
        cross, last, width = (
            _quantile(ordered, by_now - spent)
            for by_now in (SPENT * (n / most) ** SPENDING, SPENT, SPENT * (ON_WIDTH if n < most else 1))
        )
        found[n] = Look(cross, last, max(width, last), spent, ordered)
        going &= statistics <= cross
    return found


def _quantile(ordered: np.ndarray, share: float) -> float:
    """The statistic that this share of all simulated studies exceeds, or the largest."""
    return float(ordered[len(ordered) - 1 - max(0, round(share * STUDIES))])


class Settled(NamedTuple):
    """Of S studies: arrays [S]."""

    seeds: np.ndarray  # after which the pair was settled; all of them where it is not
    mean: np.ndarray
    half: np.ndarray  # half width of the interval
    shown: np.ndarray  # whether a difference was
    bounded: np.ndarray  # whether the half width was reached without one


def settle(d_SN: np.ndarray, documents_SN: np.ndarray, *, half_width: float, most: int) -> Settled:
    """Apply the rule to S studies of N seeds each, from the first look to `most`.

    d_SN: differences by seed. documents_SN: D_n after n seeds; 0 where unknown.
    """
    S, N = d_SN.shape
    seeds, half = np.full(S, N), np.full(S, np.inf)
    shown, bounded = np.zeros(S, dtype=bool), np.zeros(S, dtype=bool)
    for n, look in looks(most).items():
        if n > N:
            break
        going, D = ~(shown | bounded), documents_SN[:, n - 1]
        mean, error = d_SN[:, :n].mean(1), d_SN[:, :n].std(1, ddof=1) / np.sqrt(n)
        last, width = np.hypot(look.last * error, D), np.hypot(look.width * error, D)
        crosses = going & (np.abs(mean) > np.hypot(look.cross * error, D))
        reached = going & ~crosses & (width <= half_width)
        half = np.where(going, np.where(reached, width, last), half)
        seeds = np.where(crosses | reached, n, seeds)
        shown |= crosses
        bounded |= reached
    mean = np.where(np.arange(N) < seeds[:, None], d_SN, 0).sum(1) / seeds
    return Settled(seeds, mean, half, shown, bounded)


SHOWN, BOUNDED, LIMIT = "difference shown", "bounded", "most seeds reached"


def sequential(
    arm: Sequence[float], baseline: Sequence[float], documents: Sequence[float], until: Mapping[str, Any]
) -> Difference:
    """The pair's difference by the rule, at the look that settled it or at the last one so far.

    arm, baseline: in the same order of seeds. documents: D_n after n seeds. until: `half_width` and `most_seeds`.
    """
    most = int(until["most_seeds"])
    arm, baseline = arm[:most], baseline[:most]
    if len(arm) < min(looks(most)):
        return paired(arm, baseline, documents[len(arm) - 1])
    d_SN = np.subtract(arm, baseline)[None]
    found = settle(d_SN, np.array(documents[: len(arm)])[None], half_width=float(until["half_width"]), most=most)
    n, mean, half = int(found.seeds[0]), float(found.mean[0]), float(found.half[0])
    error, D, look = float(d_SN[0, :n].std(ddof=1)) / n**0.5, float(documents[n - 1]), looks(most)[n]
    by = SHOWN if found.shown[0] else BOUNDED if found.bounded[0] else LIMIT if n == most else ""
    effect = detectable(look.width if found.bounded[0] else look.last, error, n, D)
    p_value = look.p_value(statistic(mean, error, D))
    return Difference(n, mean, mean - half, mean + half, effect, p_value, D, error, by)
