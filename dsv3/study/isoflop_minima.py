"""Loss-optimal sizes by budget (Hoffmann et al., arXiv 2203.15556, approaches 1 and 2), and how they grow with compute.

Approach 1: at each of many budgets, the run whose smoothed training loss is lowest there, of all runs that got so far.
Approach 2: at each budget of the grid, the minimum of a parabola in log N through the losses of its runs; so with D.
Either way, N = k C^a and D = k' C^b by least squares on logarithms.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dsv3.study.parametric_law import DRAWS, interval

Array = NDArray[np.float64]

POINTS = 200
"""Budgets of approach 1, evenly spaced in log C."""


class Run(NamedTuple):
    """One of the grid."""

    parameters: float
    tokens: float
    flops: float  # that it used
    budget: float  # that it was planned for: the same for all runs of a profile
    loss: float  # at its end
    curve: tuple[Array, Array]  # FLOPs, and smoothed training loss there


class Exponents(NamedTuple):
    """Of N and D in C, each with its interval."""

    a: tuple[float, float, float]
    b: tuple[float, float, float]
    budgets: list[float]  # that had an optimum
    optima: list[tuple[float, float]]  # N and D there


def envelope(runs: Sequence[Run], seed: int = 0) -> Exponents | None:
    """Approach 1; None where one run is the best at every budget. Its interval: runs drawn with replacement."""
    ends = np.array([run.flops for run in runs])
    c = np.geomspace(ends.min(), ends.max(), POINTS)
    losses = np.stack([np.interp(c, *run.curve, right=np.inf) for run in runs])  # [runs, points]
    n, cost = np.array([run.parameters for run in runs]), np.array([run.flops / run.tokens for run in runs])

    def exponents(chosen: NDArray[np.intp]) -> tuple[Array, Array, NDArray[np.intp]]:
        best = chosen[np.argmin(losses[chosen], axis=0)]
        reached = np.isfinite(losses[best, np.arange(POINTS)])
        best, at = best[reached], c[reached]
        return np.array([_slope(at, n[best]), _slope(at, at / cost[best])]), at, best

    point, at, best = exponents(np.arange(len(runs), dtype=np.intp))
    if len(set(n[best])) < 2:
        return None
    random = np.random.default_rng(seed)
    drawn = np.array([exponents(random.integers(len(runs), size=len(runs)))[0] for _ in range(DRAWS)])
    optima = [(float(n[i]), float(x / cost[i])) for x, i in zip(at, best, strict=True)]
    return _exponents(point, drawn, at.tolist(), optima)


def minima(runs: Sequence[Run], seed: int = 0) -> Exponents | None:
    """Approach 2; None where fewer than two budgets have their minimum within the sizes that were tried.

    Its interval: residuals of the parabolas drawn with replacement, without draws that leave fewer than two minima.
    """
    profiles = [[run for run in runs if run.budget == budget] for budget in sorted({run.budget for run in runs})]
    profiles = [profile for profile in profiles if len({run.parameters for run in profile}) >= 3]
    found = [_optimum(profile, np.array([run.loss for run in profile])) for profile in profiles]
    kept = [(profile[0].budget, optimum) for profile, optimum in zip(profiles, found, strict=True) if optimum]
    if len(kept) < 2:
        return None
    fitted = [np.polyval(np.polyfit(_log_n(profile), _losses(profile), 2), _log_n(profile)) for profile in profiles]
    spare = sum(len(profile) - 3 for profile in profiles)
    errors = np.concatenate([_losses(profile) - fit for profile, fit in zip(profiles, fitted, strict=True)])
    errors *= np.sqrt(len(errors) / max(spare, 1))
    random, drawn = np.random.default_rng(seed), []
    for _ in range(DRAWS):
        new = [_optimum(p, fit + random.choice(errors, len(p))) for p, fit in zip(profiles, fitted, strict=True)]
        those = [(profile[0].budget, optimum) for profile, optimum in zip(profiles, new, strict=True) if optimum]
        if len(those) >= 2:
            drawn.append(_slopes(those))
    return _exponents(_slopes(kept), np.array(drawn), [budget for budget, _ in kept], [optimum for _, optimum in kept])


def _optimum(profile: Sequence[Run], losses: Array) -> tuple[float, float] | None:
    """N and D at the minimum of the parabolas; None where it is no minimum, or beyond the sizes that were tried."""
    place = []
    for x in (_log_n(profile), np.log([run.tokens for run in profile])):
        curvature, slope, _ = np.polyfit(x, losses, 2)
        at = -slope / (2 * curvature) if curvature > 0 else np.inf
        if not x.min() <= at <= x.max():
            return None
        place.append(float(np.exp(at)))
    return place[0], place[1]


def _slopes(optima: Sequence[tuple[float, tuple[float, float]]]) -> Array:
    c = np.array([budget for budget, _ in optima])
    n, d = np.array([optimum for _, optimum in optima]).T
    return np.array([_slope(c, n), _slope(c, d)])


def _slope(x: Array, y: Array) -> float:
    """Of log y over log x."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0]) if len(np.unique(np.log(x))) > 1 else 0.0


def _exponents(point: Array, drawn: Array, budgets: list[float], optima: list[tuple[float, float]]) -> Exponents:
    a, b = ((float(value), *interval(draws)) for value, draws in zip(point, drawn.T, strict=True))
    return Exponents(a, b, budgets, optima)


def _log_n(profile: Sequence[Run]) -> Array:
    return np.log([run.parameters for run in profile])


def _losses(profile: Sequence[Run]) -> Array:
    return np.array([run.loss for run in profile])
