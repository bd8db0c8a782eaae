"""Everything that is or was wrong with a run, as states: open since when, or closed.

Experts are judged anew from their loads (`dsv3.monitoring.expert_states`), so that a finding has a beginning and an
end. Intervals that were cut short are not judged.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from dsv3.monitoring.alerts import fewest_effective
from dsv3.monitoring.expert_states import DEAD, WELL, spells
from dsv3.reporting.history import History

DOMAIN_BELOW = 0.1
"""Of a domain's median share of the tokens: below, it is starved."""
SLOW_BELOW = 0.7
"""Of the median speed before: below, a run has slowed down."""
STEPS = 20
"""Steps whose median is a speed."""
MOST_NAMED = 6
"""Experts that a line names; the rest are counted."""
BY_EXPERT = ("dead expert", "revived expert", "collapse", "recovery")
"""Kinds of `metrics/alerts` that are found anew here."""


class Finding(NamedTuple):
    """`until`: tokens at its end; None while it is open. `layer`: "" where it concerns the whole model."""

    kind: str
    layer: str
    since: int
    until: int | None
    text: str

    @property
    def state(self) -> str:
        if self.until is None:
            return "open"
        return "closed" if self.until > self.since else "event"


def findings(run: History) -> list[Finding]:
    """Open ones first, the newest first among the open and among the others."""
    return run.kept(
        "findings", (run.routing(), run.table("timing/train"), run.table("metrics/alerts")), lambda: found(run)
    )


def found(run: History) -> list[Finding]:
    every = [*of_experts(run), *of_domains(run), *of_speed(run), *of_steps(run)]
    return sorted(every, key=lambda finding: (finding.until is not None, -(finding.until or finding.since)))


def of_experts(run: History) -> Iterator[Finding]:
    """Dead experts, and layers that use few of theirs."""
    routing = run.routing()
    for layer, load in routing.layers.items():
        state_TE, tokens_T = routing.states[layer], load.tokens_T[routing.judged[layer]]
        if not len(tokens_T):
            continue
        together: dict[tuple[int, int | None], list[int]] = {}
        for spell in spells(np.where(state_TE == DEAD, DEAD, WELL), tokens_T):
            together.setdefault((spell.since, spell.until), []).append(spell.expert)
        for (since, until), dead in together.items():
            yield Finding("dead expert", layer, since, until, experts_text(dead))
        fewest = fewest_effective(state_TE.shape[1], run.info.get("top_k", 1))
        effective_T = effective(load.load_TE[routing.judged[layer]])
        for since, until in stretches(effective_T < fewest, tokens_T):
            text = f"the load is spread over fewer than {fewest:.0f} of {state_TE.shape[1]} experts"
            yield Finding("routing collapse", layer, since, until, text)


def of_domains(run: History) -> Iterator[Finding]:
    """Domains of which training sees far fewer tokens than it did."""
    routing = run.routing()
    if not routing.domains or not routing.layers:
        return
    layer, load = next(iter(routing.layers.items()))
    at = routing.judged[layer]
    for domain, share_T in zip(routing.domains, load.share_TX[at].T, strict=True):
        usual_T = usual(pd.Series(share_T), 1).to_numpy()
        for since, until in stretches(share_T < DOMAIN_BELOW * usual_T, load.tokens_T[at]):
            text = f"{domain} has under a tenth of its usual {usual_T[-1]:.0%} of the tokens"
            yield Finding("starved domain", "", since, until, text)


def of_speed(run: History) -> Iterator[Finding]:
    """Stretches of at least `STEPS` steps at under 70% of the speed before."""
    speed = speeds(run)
    if len(speed) < 3 * STEPS:
        return
    before = usual(speed, 2 * STEPS)
    slow_T = (speed.rolling(STEPS).median() < SLOW_BELOW * before).to_numpy()
    for since, until in stretches(slow_T, speed.index.to_numpy()):
        text = f"slower than {SLOW_BELOW:.0%} of the usual {before.iloc[-1]:,.0f} tokens/s"
        yield Finding("slow-down", "", since, until, text)


def usual(values: pd.Series, fewest: int) -> pd.Series:
    """The median of all values so far, at its highest: a fall that lasts does not become usual."""
    return values.expanding(fewest).median().cummax()


def of_steps(run: History) -> Iterator[Finding]:
    """What the guard against loss spikes and the rollouts found in a step."""
    alerts = run.table("metrics/alerts")
    if len(alerts):
        for row in alerts[~alerts.kind.isin(BY_EXPERT)].itertuples():
            yield Finding(str(row.kind), str(row.layer), int(row.tokens), int(row.tokens), str(row.text))


def speeds(run: History) -> pd.Series:
    """Tokens a second of each step, by the tokens at its end."""
    timing = run.table("timing/train")
    if timing.empty:
        return pd.Series(dtype=float)
    return run.kept("speeds", (timing,), lambda: speeds_of(timing))


def speeds_of(timing: pd.DataFrame) -> pd.Series:
    trained = timing.tokens.diff().fillna(timing.tokens)
    return pd.Series((trained / timing.seconds.clip(lower=1e-9)).to_numpy(), index=timing.tokens.to_numpy())


def experts_text(numbers: Sequence[int]) -> str:
    shown = ", ".join(map(str, numbers[:MOST_NAMED]))
    more = f" and {len(numbers) - MOST_NAMED} more" if len(numbers) > MOST_NAMED else ""
    return f"expert{'s' if len(numbers) > 1 else ''} {shown}{more}"


def effective(relative_TE: np.ndarray) -> np.ndarray:
    """Effective experts of each interval, exp of the entropy of the load, [T]."""
    share_TE = relative_TE / np.maximum(relative_TE.sum(1, keepdims=True), 1e-9)
    return np.exp(-(share_TE * np.log(np.maximum(share_TE, 1e-20))).sum(1))


def stretches(true_T: np.ndarray, tokens_T: np.ndarray) -> Iterator[tuple[int, int | None]]:
    """Beginning and end, in tokens, of each row of intervals in which something holds; the last may be open."""
    for spell in spells(np.where(true_T, DEAD, WELL)[:, None], tokens_T):
        yield spell.since, spell.until
