"""Plots of whole runs over tokens, seconds or FLOPs: losses, rates, quantisation error, benchmarks."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from dsv3.evaluation.benchmarks.statistics import accuracy_interval, clopper_pearson
from dsv3.reporting.history import History
from dsv3.reporting.palette import COLOURS
from dsv3.reporting.style import (
    GRID,
    MOST_MARKERS,
    MOST_POINTS,
    TOKENS,
    X_AXES,
    Panel,
    empty,
    evenly,
    line,
    numbers,
    outline,
    plotted,
    points,
    stacked,
)  # fmt: skip


def thinned(table: pd.DataFrame) -> pd.DataFrame:
    """At most `MOST_POINTS` rows, evenly, for what is smooth; the last one is kept."""
    return table if len(table) <= MOST_POINTS else table.iloc[evenly(len(table), MOST_POINTS)]


def loss(run: History) -> go.Figure:
    """The objective's loss, as it was and smoothed, and every other figure of its unit."""
    every = run.train()
    train = thinned(every)
    if train.empty:
        return empty("Training loss", "no training steps logged yet")
    (first, unit), *others = run.statistics().items()
    raw = {"color": COLOURS[0], "width": 0.6}
    x, y = outline(every.tokens.to_numpy(), every[first].to_numpy())
    traces = [points(x, y, line=raw, opacity=0.35, name=f"{first}, each step")]
    for i, name in enumerate([first, *(name for name, other in others if other == unit)]):
        traces.append(points(train.tokens, train[f"{name}_mean"], line=line(i), name=f"{name}, smoothed"))
    return plotted(traces, "Training loss", x=TOKENS, y=unit)


def figures(run: History) -> go.Figure:
    """Every other figure that the objective and the parts record of a step, smoothed, in a panel for each unit."""
    train = thinned(run.train())
    title = "Other figures of a step"
    if train.empty:
        return empty(title, "no training steps logged yet")
    _, *units = dict.fromkeys(run.statistics().values())
    if not units:
        return empty(title, "this objective records its loss only")
    panels = [Panel(", ".join(names_with(run, unit)), unit) for unit in units]
    traces = (
        (place, points(train.tokens, train[f"{name}_mean"], line=line(i), name=name))
        for place, unit in enumerate(units)
        for i, name in enumerate(names_with(run, unit))
    )
    return stacked(title, panels, traces, x=TOKENS)


def names_with(run: History, unit: str) -> list[str]:
    """The statistics of a unit."""
    return [name for name, other in run.statistics().items() if other == unit]


def held_out(run: History) -> go.Figure:
    """Bits per byte of the held-out text of each domain."""
    scores = run.validation()
    if scores.empty:
        return empty("Held-out text", "no validation logged yet")
    traces = [
        points(*outline(rows.tokens.to_numpy(), rows.bpb.to_numpy()), mode=mode(rows), line=line(i), name=str(domain))
        for i, (domain, rows) in enumerate(scores.groupby("domain", sort=False))
    ]
    return plotted(traces, "Held-out text", x=TOKENS, y="bits per byte")


def mode(rows: Any) -> str:
    """Few points are marked; many would hide the line, and take long to draw."""
    return "lines+markers" if len(rows) <= MOST_MARKERS else "lines"


def rates(run: History) -> go.Figure:
    """Learning rate, norm of the gradient before clipping, and speed."""
    train = run.train()
    if train.empty:
        return empty("Learning rate, gradient norm, speed", "no training steps logged yet")
    seconds = train.seconds.diff() / train.tokens.diff()
    values = (train.lr, train.grad_norm, 1 / seconds.rolling(20, min_periods=1).median())
    panels = [
        Panel("learning rate", "per update"),
        Panel("gradient norm before clipping", "L2"),
        Panel("speed", "tokens/s"),
    ]
    traces = []
    for i, column in enumerate(values):
        x, y = outline(train.tokens.to_numpy(), column.to_numpy())
        traces.append((i, points(x, y, line=line(i), name=panels[i].title, showlegend=False)))
    from_zero = {"yaxis": {"rangemode": "tozero"}}
    return stacked("Learning rate, gradient norm, speed", panels, traces, x=TOKENS, left=84, axes=from_zero)


def comparison(runs: Sequence[History], *, x: str, what: str = "training loss") -> go.Figure:
    """Several runs over one of `X_AXES`: smoothed training loss, or bits per byte of all held-out text."""
    title, unit = f"Runs compared: {what}", "nats per token" if what == "training loss" else "bits per byte"
    traces = []
    for i, run in enumerate(runs):
        if what == "training loss":
            rows = thinned(run.train())
            y = "loss_mean"
        else:
            rows, y = run.validation(), "bpb"
            rows = rows[rows.domain == "all"] if len(rows) else rows
        if len(rows) and rows[x].notna().any():
            traces.append(points(rows[x], rows[y], mode=mode(rows), line=line(i), name=run.name))
    return plotted(traces, title, x=X_AXES[x], y=unit, height=400)


def formats(run: History) -> go.Figure:
    """Quantisation error, by role of layer: every numeric column of a table of such diagnostics."""
    title = "Quantisation error (FP8), by role of layer"
    tables = run.tables_by_role()
    if not tables:
        return empty(title, "no quantisation error logged")
    name, table = next(iter(tables.items()))
    numeric = [c for c in table.columns if c != "tokens" and pd.api.types.is_numeric_dtype(table[c])]
    keys = [c for c in table.columns if c not in numeric and c != "tokens"]
    traces = []
    for i, (key, rows) in enumerate(table.groupby(keys, sort=False)):
        label = " ".join(map(str, key))
        for panel, column in enumerate(numeric):
            shown = {"name": label, "legendgroup": label, "showlegend": panel == 0}
            x, y = outline(rows.tokens.to_numpy(), rows[column].to_numpy())
            traces.append((panel, points(x, y, mode=mode(rows), line=line(i), **shown)))
    panels = [Panel(column, UNITS.get(column, column)) for column in numeric]
    return stacked(f"{title}: {name}", panels, traces, x=TOKENS)


UNITS = {"snr_db": "dB", "underflow": "fraction", "saturation": "fraction", "amax": "largest magnitude"}


def questions(runs: Sequence[History]) -> go.Figure:
    """Exact match on held-out questions, by family, with 95% intervals, next to the majority baseline."""
    title = "Held-out questions, exact match"
    traces: list[dict[str, Any]] = []
    for i, run in enumerate(runs):
        scores = (run.summary or {}).get("questions", {})
        if not scores:
            continue
        shares = {f: [100 * s[k] / s["questions"] for k in ("correct", "majority_correct")] for f, s in scores.items()}
        if not traces:
            base = [values[1] for values in shares.values()]
            traces.append(bars(list(shares), base, GRID, "majority baseline"))
        right = np.array([values[0] for values in shares.values()])
        ends = 100 * np.array([clopper_pearson(score["correct"], score["questions"]) for score in scores.values()])
        traces.append(bars(list(shares), right, line(i)["color"], run.name, error_y=to_ends(right, ends)))
    if not traces:
        return empty(title, "scored at the end of a run")
    return plotted(traces, title, x="question family", y="accuracy, per cent")


def bars(x: Sequence[str], y: Any, colour: str, name: str, **keys: Any) -> dict[str, Any]:
    return {"type": "bar", "x": x, "y": numbers(y), "marker": {"color": colour}, "name": name, **keys}


def to_ends(values: np.ndarray, ends: np.ndarray) -> dict[str, Any]:
    """Error bars of Plotly from each value to the two ends of its interval."""
    down, up = np.abs(ends - values[:, None]).T
    return {"type": "data", "symmetric": False, "array": numbers(up), "arrayminus": numbers(down)}


def benchmarks(runs: Sequence[History]) -> go.Figure:
    """The latest score of each benchmark, from `metrics/benchmarks`, with the 95% interval of an accuracy or the
    standard error of any other score."""
    title = "Benchmarks"
    traces = []
    for i, run in enumerate(runs):
        table = run.newest("metrics/benchmarks")
        if table.empty:
            continue
        last = table[table.tokens == table.tokens.iloc[-1]]
        names = (last.task + ", " + last.metric).to_list()
        ends = [
            accuracy_interval(row.value, row.stderr, row.n) or (row.value - row.stderr, row.value + row.stderr)
            for row in last.itertuples()
        ]
        error = to_ends(last.value.to_numpy(), np.array(ends))
        traces.append(bars(names, last.value, line(i)["color"], run.name, error_y=error))
    if not traces:
        return empty(title, "no benchmark scores logged")
    return plotted(traces, title, x="task, metric", y="score", height=420)
