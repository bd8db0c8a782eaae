"""Alerts about experts: dead experts and routing collapse, by name.

dead expert     its load over the interval is below 1% of the balanced load
collapse        the load is spread over fewer than a quarter of the layer's experts (or hardly more than the K that one
                token uses: fewer than 1.5 K, or than halfway from K to all), measured by effective experts =
                exp(entropy of the load)
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

DEAD_BELOW = 0.01  # of the balanced load
COLLAPSED_BELOW = 0.25  # of the experts
COLLAPSED_NEAR_TOP_K = 1.5


class Alert(NamedTuple):
    """One row of `metrics/alerts`."""

    tokens: int  # trained on so far
    layer: str  # the MoE layer; "" where the alert concerns the whole model
    kind: str  # dead expert, revived expert, collapse, recovery; loss spike, non-finite loss, ... (see the guard)
    expert: int  # -1: none in particular
    value: float
    text: str


def condition(figures: dict[str, Any], *, top_k: int) -> dict[tuple[str, int], float]:
    """(kind, expert) -> value of everything that is wrong with a layer in this interval."""
    load, effective = figures["load"], figures["effective_experts"]
    even = sum(load) / len(load)
    wrong = {("dead expert", i): count / even for i, count in enumerate(load) if even and count < DEAD_BELOW * even}
    if even and effective < fewest_effective(len(load), top_k):
        wrong["collapse", -1] = effective
    return wrong


def fewest_effective(n_experts: int, top_k: int) -> float:
    """Effective experts below which a layer's routing has collapsed."""
    near_top_k = min(COLLAPSED_NEAR_TOP_K * top_k, (top_k + n_experts) / 2)
    return max(COLLAPSED_BELOW * n_experts, near_top_k)


def changes(
    tokens: int,
    layer: str,
    n_experts: int,
    before: set[tuple[str, int]],
    now: dict[tuple[str, int], float],
) -> Iterator[Alert]:
    """What began and what ended since the last interval; what lasts is not told again."""
    for kind, expert in sorted(now.keys() - before):
        value = now[kind, expert]
        if kind == "collapse":
            text = f"{layer}: routing collapse, {value:.1f} of {n_experts} experts effective"
        else:
            text = f"{layer} expert {expert} is dead: {value:.2%} of the balanced load"
        yield Alert(tokens, layer, kind, expert, value, text)
    for kind, expert in sorted(before - now.keys()):
        if kind == "collapse":
            yield Alert(tokens, layer, "recovery", -1, 0.0, f"{layer} uses its experts again")
        else:
            yield Alert(tokens, layer, "revived expert", expert, 0.0, f"{layer} expert {expert} has load again")
