"""Parametric scaling law (Hoffmann et al., arXiv 2203.15556, approach 3), in float64:

    L(N, D) = E + A / N^alpha + B / D^beta        N parameters, D training tokens

    minimise   sum_i huber(log L(N_i, D_i) - log L_i),  delta = 1e-2

over theta = (log E, log A, alpha, log B, beta). That is not convex, so the fit starts at many places: at every (alpha,
beta) of a grid, E, A and B follow by linear least squares, and scipy goes on from the best of these. With the published
delta of 1e-3 and runs whose noise is 0.5%, the fit passes through five runs exactly, and intervals are too narrow.

Intervals are bootstrapped. N and D of the runs are designed, so residuals are drawn with replacement, not runs. Before,
each is divided by sqrt(1 - h), with h its leverage, and multiplied by t(n - 5) / z, the quantiles of Student's and the
normal distribution at 97.5%, for few runs. The law is fitted to each draw; the interval is from the 2.5% to the 97.5%
quantile. All draws are fitted together, by Gauss-Newton with Huber's weights.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

DELTA = 1e-2
"""Of Huber's loss on logarithms: beyond it, an error counts by its size and not by its square."""
EXPONENTS = np.geomspace(0.05, 2.0, 24)
"""Starts of alpha and beta; the ends are their bounds."""
STARTS = 40
LOW = np.array([np.log(1e-6), -30, EXPONENTS[0], -30, EXPONENTS[0]])
HIGH = np.array([5, 60, EXPONENTS[-1], 60, EXPONENTS[-1]])
"""Bounds of theta."""
DRAWS, ROUNDS = 500, 150
LEVEL = 0.95


class Law(NamedTuple):
    """A fitted law. Arrays of draws have the same five numbers in their last axis: log E, log A, alpha, log B, beta."""

    theta: Array  # [5]
    draws: Array  # [draws, 5]
    residuals: Array  # log measured - log fitted, as drawn from
    cost: float  # of the objective

    def __call__(self, parameters: ArrayLike, tokens: ArrayLike) -> Array:
        """Loss at these sizes."""
        n, d = np.broadcast_arrays(np.asarray(parameters, float), np.asarray(tokens, float))
        return np.exp(log_loss(self.theta, n.ravel(), d.ravel())).reshape(n.shape)

    def constants(self) -> dict[str, tuple[float, float, float]]:
        """E, A, alpha, B, beta, and a = beta / (alpha + beta), each with the ends of its interval."""
        return {name: estimate(self.theta, self.draws, name) for name in ("E", "A", "alpha", "B", "beta", "a")}

    def predict(self, parameters: float, tokens: float, seed: int = 0) -> tuple[float, float, float]:
        """Loss of one further run, and its interval: of the law and of a run's own noise."""
        n, d = np.array([parameters]), np.array([tokens])
        noise = np.random.default_rng(seed).choice(self.residuals, len(self.draws))
        drawn = np.exp(log_loss(self.draws, n, d)[:, 0] + noise)
        return (float(self(n, d)[0]), *interval(drawn))


def interval(draws: Array) -> tuple[float, float]:
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def estimate(theta: Array, draws: Array, name: str) -> tuple[float, float, float]:
    def of(t: Array) -> Array:
        e, a, alpha, b, beta = np.moveaxis(t, -1, 0)
        values = {"E": np.exp(e), "A": np.exp(a), "alpha": alpha, "B": np.exp(b), "beta": beta}
        return np.asarray(values[name] if name in values else beta / (alpha + beta))

    return (float(of(theta)), *interval(of(draws)))


def log_loss(theta: Array, parameters: Array, tokens: Array) -> Array:
    """log L of every law [..., 5] at every point [n]: [..., n]."""
    return np.asarray(np.logaddexp.reduce(_terms(theta, parameters, tokens), axis=-2))


def _terms(theta: Array, parameters: Array, tokens: Array) -> Array:
    """Logarithms of the three terms: [..., 3, n]."""
    e, a, alpha, b, beta = (part[..., None] for part in np.moveaxis(theta, -1, 0))
    n, d = np.log(parameters), np.log(tokens)
    return np.stack(np.broadcast_arrays(e + 0 * n, a - alpha * n, b - beta * d), axis=-2)


def fit(parameters: ArrayLike, tokens: ArrayLike, loss: ArrayLike, *, draws: int | None = None, seed: int = 0) -> Law:
    """Fit the law to runs: their parameters, tokens and losses, one each. draws: of the bootstrap; None: DRAWS.

    Raises:
        ValueError: there are fewer than seven runs, or one of two sizes or two numbers of tokens alone.
    """
    n, d, y = (np.asarray(values, float) for values in (parameters, tokens, loss))
    if len(y) < 7 or len(np.unique(n)) < 3 or len(np.unique(d)) < 3:
        raise ValueError(f"{len(y)} runs of {len(np.unique(n))} sizes: a law needs 7 runs and 3 sizes at least")
    theta, least = _point(n, d, np.log(y))
    residuals = scaled_residuals(theta, n, d, np.log(y))
    drawn = log_loss(theta, n, d) + np.random.default_rng(seed).choice(residuals, (draws or DRAWS, len(y)))
    return Law(theta, refit(theta, n, d, drawn), residuals, least)


def scaled_residuals(theta: Array, n: Array, d: Array, log_y: Array) -> Array:
    """What is drawn from: see the top of this file."""
    from scipy.stats import norm, t

    q, _ = np.linalg.qr(_jacobian(theta, n, d))
    leverage = np.minimum((q**2).sum(-1), 0.9)
    scaled = (log_y - log_loss(theta, n, d)) / np.sqrt(1 - leverage)
    tail = (1 + LEVEL) / 2
    return np.asarray((scaled - scaled.mean()) * t.ppf(tail, len(log_y) - 5) / norm.ppf(tail))


def _point(n: Array, d: Array, log_y: Array) -> tuple[Array, float]:
    """The best fit of all starts, and its cost."""
    from scipy.optimize import least_squares

    reached = refit(_starts(n, d, log_y), n, d, np.repeat(log_y[None], STARTS, 0))
    best = least_squares(
        lambda theta: log_loss(theta, n, d) - log_y,
        np.clip(reached[np.argmin(cost(reached, n, d, log_y))], LOW + 1e-9, HIGH - 1e-9),
        jac=lambda theta: _jacobian(theta, n, d),
        bounds=(LOW, HIGH),
        loss="huber",
        f_scale=DELTA,
        x_scale="jac",
        xtol=1e-12,
        ftol=1e-12,
        gtol=1e-12,
    )
    return np.asarray(best.x), float(best.cost)


def cost(theta: Array, n: Array, d: Array, log_y: Array) -> Array:
    """What is minimised, of every law [..., 5] with its losses [..., n]: [...]."""
    size = np.abs(log_loss(theta, n, d) - log_y)
    return np.asarray(np.where(size <= DELTA, size**2 / 2, DELTA * (size - DELTA / 2)).sum(-1))


def _jacobian(theta: Array, n: Array, d: Array) -> Array:
    """Of log L by theta: [..., n, 5]."""
    terms = _terms(theta, n, d)
    e, a, b = np.moveaxis(np.exp(terms - np.logaddexp.reduce(terms, axis=-2)[..., None, :]), -2, 0)
    return np.stack((e, a, -a * np.log(n), b, -b * np.log(d)), axis=-1)


def _starts(n: Array, d: Array, log_y: Array) -> Array:
    """The best of those that have E, A and B by least squares on relative errors: [STARTS, 5]."""
    alpha, beta = (grid.ravel() for grid in np.meshgrid(EXPONENTS, EXPONENTS))
    y = np.exp(log_y)
    scale_n, scale_d = np.exp(np.log(n).mean()), np.exp(np.log(d).mean())
    columns = np.stack(
        (np.ones((len(alpha), len(n))), (n / scale_n) ** -alpha[:, None], (d / scale_d) ** -beta[:, None])
    )
    design = np.moveaxis(columns, 0, -1) / y[:, None]  # [grid, n, 3]
    ridge = 1e-9 * np.eye(3)
    solved = np.linalg.solve(np.swapaxes(design, 1, 2) @ design + ridge, design.sum(1)[..., None])[..., 0]
    solved = np.maximum(solved, 1e-3 * y.min())
    errors = np.abs((design * solved[:, None]).sum(-1) - 1).sum(1)
    e, a, b = np.log(solved).T
    theta = np.stack((e, a + alpha * np.log(scale_n), alpha, b + beta * np.log(scale_d), beta), axis=1)
    return np.asarray(theta[np.argsort(errors)[:STARTS]])


def refit(start: Array, n: Array, d: Array, log_y: Array) -> Array:
    """Fit every row of `log_y` [draws, n], all at once, from one start [5] or one of each [draws, 5]: [draws, 5].

    Gauss-Newton with Huber's weights and a step that is damped where it does not help.
    """
    now, damping = np.broadcast_to(start, (len(log_y), 5)), np.full(len(log_y), 1e-3)
    best = cost(now, n, d, log_y)
    for _ in range(ROUNDS):
        error, jacobian = log_loss(now, n, d) - log_y, _jacobian(now, n, d)
        weights = 1 / np.maximum(np.abs(error) / DELTA, 1)
        weighted = np.swapaxes(jacobian * weights[..., None], 1, 2)
        normal = weighted @ jacobian
        diagonal = np.einsum("rii->ri", normal)
        damped = normal + np.eye(5) * (damping[:, None] * diagonal + 1e-12)[:, None]
        tried = np.clip(now - np.linalg.solve(damped, weighted @ error[..., None])[..., 0], LOW, HIGH)
        reached = cost(tried, n, d, log_y)
        better = reached < best
        now, best = np.where(better[:, None], tried, now), np.where(better, reached, best)
        damping = np.clip(np.where(better, damping / 4, damping * 5), 1e-9, 1e6)
    return now
