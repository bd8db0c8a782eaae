"""Curves of several runs in one plot: a panel for each figure, smoothed, on any x-axis, by run or by group of runs."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from dsv3.reporting.curves import mode
from dsv3.reporting.findings import speeds
from dsv3.reporting.history import History
from dsv3.reporting.style import COLOURS, Panel, empty, few, line, outline, points, stacked

X_AXES = {
    "tokens": "training tokens",
    "steps": "optimiser steps",
    "seconds": "seconds of training",
    "flops": "floating-point operations",
}
HELD_OUT = "held-out bits per byte"
OWN_UNITS = {
    "gradient norm": ("grad_norm", "L2"),
    "learning rate": ("lr", "per update"),
}
"""Columns of `metrics/train` that every run has besides the statistics of its objective."""
GRID_POINTS = 400
"""At which a group's runs are compared."""


class Curve(NamedTuple):
    """A figure of a run, by tokens. `noisy`: one value a step, which may be smoothed."""

    tokens: np.ndarray
    values: np.ndarray
    unit: str
    noisy: bool


def metrics(runs: Sequence[History]) -> list[str]:
    """Names of the figures that any of the runs has."""
    names = dict.fromkeys(name for run in runs for name in run.statistics())
    scores = [run.newest("metrics/validation") for run in runs]
    domains = dict.fromkeys(d for rows in scores for d in rows.get("domain", []) if d != "all")
    return [*names, *OWN_UNITS, "tokens/s", "MaxVio, worst layer", HELD_OUT, *(f"{HELD_OUT}, {d}" for d in domains)]


def scores_of(run: History) -> pd.DataFrame:
    scores = run.table("metrics/validation")
    return scores[scores.weights == "live"] if len(scores) else scores


def curve(run: History, metric: str) -> Curve | None:
    """None where the run has no such figure (yet)."""
    train = run.table("metrics/train")
    if train.empty:
        return None
    if metric == "tokens/s":
        speed = speeds(run)
        return Curve(speed.index.to_numpy(), speed.to_numpy(), "tokens/s", True)
    if metric == "MaxVio, worst layer":
        worst_T = worst_violation(run)
        return Curve(worst_T.index.to_numpy(), worst_T.to_numpy(), "MaxVio", False)
    if metric.startswith(HELD_OUT):
        scores = scores_of(run)
        domain = metric.removeprefix(HELD_OUT).removeprefix(", ") or "all"
        rows = scores[scores.domain == domain] if len(scores) else scores
        return Curve(rows.tokens.to_numpy(), rows.bpb.to_numpy(), "bits per byte", False) if len(rows) else None
    column, unit = OWN_UNITS.get(metric, (metric, run.statistics().get(metric, "")))
    return Curve(train.tokens.to_numpy(), train[column].to_numpy(), unit, True) if column in train else None


def worst_violation(run: History) -> pd.Series:
    """The largest MaxVio of any layer, by the tokens at each interval's end. Of `metrics/routing`, with its load of
    every expert, no more is read: many runs may be drawn."""
    rows = run.table("metrics/routing", ("tokens", "max_vio_interval"))
    if rows.empty:
        return pd.Series(dtype=float)
    return run.kept("worst violation", (rows,), lambda: rows.groupby("tokens").max_vio_interval.max())


def along(run: History, tokens: np.ndarray, x: str) -> np.ndarray:
    """The same places on another x-axis."""
    if x == "tokens":
        return tokens
    if x == "flops":
        return tokens * run.info.get("flops_per_token", np.nan)
    if x == "steps":
        known = run.table("metrics/train")
        places = known["step"] if "step" in known else pd.Series(np.arange(1, len(known) + 1))
    else:
        known = run.table("timing/train")
        places = known.seconds.cumsum()
    return np.interp(tokens, [0, *known.tokens], [0.0, *places])


def overlay(
    groups: Mapping[str, Sequence[History]],
    names: Sequence[str],
    *,
    title: str = "Curves",
    x: str = "tokens",
    smooth: float = 0.0,
    log: Sequence[str] = (),
) -> go.Figure:
    """A panel for each figure; a line for each group: its one run, or the mean of its runs in the band of their range.

    smooth: weight of the past in an exponential mean over steps, from 0 up to 1. log: `x`, `y`.
    """
    if not groups:
        return empty(title, "select runs in the table")
    if not names:
        return empty(title, "choose a figure")
    panels: list[Panel] = []
    traces: list[tuple[int, dict[str, Any]]] = []
    for panel, name in enumerate(names):
        unit = ""
        for i, (label, runs) in enumerate(groups.items()):
            curves = [(run, found) for run in runs if (found := curve(run, name)) is not None and len(found.tokens)]
            unit = curves[0][1].unit if curves else unit
            lines = [(along(run, found.tokens, x), smoothed(found, smooth)) for run, found in curves]
            raw = curves[0][1].values if len(curves) == 1 and curves[0][1].noisy and smooth else None
            # The legend names each group once, by its first panel that has it.
            known = any(trace["name"] == label for _, trace in traces)
            shown = {"name": label, "legendgroup": label, "showlegend": not known}
            traces += [(panel, trace) for trace in drawn(lines, raw, i, shown)]
        panels.append(Panel(name, unit))
    axes, zoom = {f"{axis}axis": {"type": "log"} for axis in log}, f"{x} {' '.join(log)}"
    return stacked(title, panels, traces, x=X_AXES[x], each=240, axes=axes, showlegend=few(groups), uirevision=zoom)


def smoothed(found: Curve, smooth: float) -> np.ndarray:
    if not found.noisy or not smooth:
        return found.values
    return pd.Series(found.values).ewm(alpha=1 - smooth).mean().to_numpy()


def drawn(
    lines: Sequence[tuple[np.ndarray, np.ndarray]], raw: np.ndarray | None, i: int, shown: dict[str, Any]
) -> list[dict[str, Any]]:
    """One line over its raw values, or a mean in its band."""
    if not lines:
        return []
    if len(lines) > 1:
        x, low, mean, high = band(lines)
        fill = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip", "legendgroup": shown["legendgroup"]}
        fill |= {"showlegend": False, "name": f"{shown['name']}, range"}
        colour = "rgba({}, {}, {}, 0.2)".format(*(int(COLOURS[i % len(COLOURS)][k : k + 2], 16) for k in (1, 3, 5)))
        upper = points(x, high, fill="tonexty", fillcolor=colour, **fill)
        return [points(x, low, **fill), upper, points(x, mean, mode="lines", line=line(i), **shown)]
    ((places, values),) = lines
    x, y = outline(places, values)
    traces = [points(x, y, mode=mode(x), line=line(i), **shown)]
    if raw is not None:
        x, y = outline(places, raw)
        thin = {"color": line(i)["color"], "width": 0.6}
        below = shown | {"showlegend": False, "name": f"{shown['name']}, each step"}
        traces.insert(0, points(x, y, mode="lines", line=thin, opacity=0.3, hoverinfo="skip", **below))
    return traces


def band(lines: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Places that all lines reach, and there the lowest, mean and highest value."""
    start, end = max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines)
    most = max(len(x) for x, _ in lines)
    grid = np.linspace(start, end, min(most, GRID_POINTS))
    values = np.stack([np.interp(grid, x, y) for x, y in lines])
    return grid, values.min(0), values.mean(0), values.max(0)
