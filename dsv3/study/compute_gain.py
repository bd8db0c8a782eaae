"""Gain of one arm over another in compute: "is it a constant factor?"

The frontier of a law is the lowest loss at a budget, L*(C) = min over N of L(N, C / f(N)), where a token costs f(N)
FLOPs: a power law through the sizes of the grid. With C' the budget at which the baseline's frontier reaches the loss
that the arm's has at C, the factor is C' / C: above 1, the arm needs less. It is a constant where its logarithm does
not change from the smallest budget of the grid to the largest.
"""

from typing import NamedTuple

import numpy as np

from dsv3.study.parametric_law import Array, Law, interval, log_loss

SIZES, BUDGETS = 80, 5
BEYOND = 30.0
"""Factor by which sizes and budgets are looked for outside the grid's own."""


class Gain(NamedTuple):
    """Factors of compute, each with its interval."""

    factor: tuple[float, float, float]  # geometric mean over the budgets
    at_least: tuple[float, float, float]  # at the smallest budget
    at_most: tuple[float, float, float]  # at the largest
    change: tuple[float, float, float]  # of the factor from the smallest to the largest: 1 where it is constant

    @property
    def constant(self) -> bool:
        """Whether nothing speaks against a constant factor."""
        return self.change[1] <= 1 <= self.change[2]


class Sizes(NamedTuple):
    """Of one arm's grid: parameters and FLOPs per token of its runs."""

    parameters: Array
    flops_per_token: Array


def compute_gain(arm: Law, baseline: Law, of_arm: Sizes, of_baseline: Sizes, budgets: tuple[float, float]) -> Gain:
    """budgets: the smallest and the largest of the grid."""
    points = _log_factors(arm.theta[None], baseline.theta[None], of_arm, of_baseline, budgets)[0]
    count = min(len(arm.draws), len(baseline.draws))
    drawn = _log_factors(arm.draws[:count], baseline.draws[:count], of_arm, of_baseline, budgets)

    def with_interval(value: float, draws: Array) -> tuple[float, float, float]:
        low, high = interval(draws)
        return float(np.exp(value)), float(np.exp(low)), float(np.exp(high))

    return Gain(
        with_interval(points.mean(), drawn.mean(1)),
        with_interval(points[0], drawn[:, 0]),
        with_interval(points[-1], drawn[:, -1]),
        with_interval(points[-1] - points[0], drawn[:, -1] - drawn[:, 0]),
    )


def _log_factors(arm: Array, baseline: Array, of_arm: Sizes, of_baseline: Sizes, budgets: tuple[float, float]) -> Array:
    """[draws, budgets]"""
    c = np.geomspace(*budgets, BUDGETS)
    wide = np.geomspace(budgets[0] / BEYOND, budgets[1] * BEYOND, 12 * BUDGETS)
    ours, theirs = _frontier(arm, of_arm, c), _frontier(baseline, of_baseline, wide)
    reached = [np.interp(-a, -b, np.log(wide)) for a, b in zip(ours, theirs, strict=True)]  # losses fall with compute
    return np.asarray(reached - np.log(c))


def _frontier(theta: Array, sizes: Sizes, c: Array) -> Array:
    """log L*(C) of every law: [draws, budgets]."""
    exponent, constant = np.polyfit(np.log(sizes.parameters), np.log(sizes.flops_per_token), 1)
    n = np.geomspace(sizes.parameters.min() / BEYOND, sizes.parameters.max() * BEYOND, SIZES)
    cost = np.exp(constant) * n**exponent
    best = np.full((len(theta), len(c)), np.inf)
    for size, per_token in zip(n, cost, strict=True):  # a matrix of all of them would not fit the cache
        best = np.minimum(best, log_loss(theta, np.full(len(c), size), c / per_token))
    return best
