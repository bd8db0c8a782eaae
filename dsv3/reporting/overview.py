"""One row for each run: how far it is, and how it does."""

from collections.abc import Mapping
from typing import Any

from dsv3.reporting.history import History

RECENT = 20
"""Steps whose mean speed tells when a run will end."""


def overview(run: History) -> Mapping[str, Any]:
    """What is known of a run by the newest parts of its tables; None where it has no such figure (yet).

    `state`: finished, failed, training or stopped. `tokens` trained on of `planned` ones. `seconds_left`: of training,
    at the speed of the last steps, in a run that trains now. `bpb`: bits per byte of all held-out text, live weights.
    `max_violation`: the largest of the last interval, in `worst_layer`. `why`: a failed run's error.
    """
    state, planned = run.state, run.info.get("tokens")
    steps = run.newest("metrics/train")
    tokens = None if steps.empty else int(steps.tokens.iloc[-1])
    return {
        "run": run.name,
        "state": state,
        "tokens": tokens or 0,
        "planned": tokens if state == "finished" else planned,
        "seconds_left": seconds_left(run, tokens, planned) if state == "training" else None,
        "bpb": held_out(run),
        **worst_layer(run),
        "why": run.folder.failure() if state == "failed" else None,
    }


def seconds_left(run: History, tokens: int | None, planned: int | None) -> float | None:
    timing = run.newest("timing/train").tail(RECENT)
    if len(timing) < 2 or tokens is None or planned is None:
        return None
    trained = int(timing.tokens.iloc[-1] - timing.tokens.iloc[0])
    return (planned - tokens) * float(timing.seconds.iloc[1:].sum()) / trained


def held_out(run: History) -> float | None:
    scores = run.newest("metrics/validation")
    if scores.empty:
        return None
    rows = scores[(scores.weights == "live") & (scores.domain == "all")]
    return None if rows.empty else float(rows.bpb.iloc[-1])


def worst_layer(run: History) -> Mapping[str, Any]:
    routing = run.newest("metrics/routing")
    if routing.empty:
        return {"max_violation": None, "worst_layer": None}
    last = routing[routing.tokens == routing.tokens.max()]
    worst = last.loc[last.max_vio_interval.idxmax()]
    return {"max_violation": float(worst.max_vio_interval), "worst_layer": str(worst.layer)}
