"""Plots of whole runs over tokens, seconds or FLOPs: losses, rates, quantisation error, benchmarks."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from dsv3.evaluation.benchmarks.statistics import accuracy_interval
from dsv3.reporting.history import History
from dsv3.reporting.palette import COLOURS
from dsv3.reporting.style import GRID, MOST_POINTS, TOKENS, X_AXES, Panel, empty, framed, line, outline, stacked


def thinned(frame: pd.DataFrame) -> pd.DataFrame:
    """At most `MOST_POINTS` rows, evenly, for what is smooth; the last one is kept."""
    if len(frame) <= MOST_POINTS:
        return frame
    return frame.iloc[np.unique(np.linspace(0, len(frame) - 1, MOST_POINTS).astype(int))]


def numbers(column: Any) -> np.ndarray:
    """A column as plotly takes it in the fewest bytes; single precision is finer than a screen."""
    values = np.asarray(column)
    return values.astype(np.float32) if values.dtype.kind == "f" else values


def loss(run: History) -> go.Figure:
    """The objective's loss, as it was and smoothed, and every other figure of its unit."""
    every = run.train()
    train = thinned(every)
    figure = go.Figure()
    if train.empty:
        return empty("Training loss", "no training steps logged yet")
    (first, unit), *others = run.statistics().items()
    raw = {"color": COLOURS[0], "width": 0.6}
    x, y = outline(every.tokens.to_numpy(), every[first].to_numpy())
    figure.add_scatter(x=x, y=numbers(y), line=raw, opacity=0.35, name=f"{first}, each step")
    for i, name in enumerate([first, *(name for name, other in others if other == unit)]):
        figure.add_scatter(x=train.tokens, y=numbers(train[f"{name}_mean"]), line=line(i), name=f"{name}, smoothed")
    return framed(figure, "Training loss", x=TOKENS, y=unit)


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
        (place, go.Scatter(x=train.tokens, y=numbers(train[f"{name}_mean"]), line=line(i), name=name))
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
    figure = go.Figure()
    for i, (domain, rows) in enumerate(scores.groupby("domain", sort=False)):
        figure.add_scatter(x=rows.tokens, y=numbers(rows.bpb), mode="lines+markers", line=line(i), name=str(domain))
    return framed(figure, "Held-out text", x=TOKENS, y="bits per byte")


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
        traces.append((i, go.Scatter(x=x, y=numbers(y), line=line(i), name=panels[i].title, showlegend=False)))
    figure = stacked("Learning rate, gradient norm, speed", panels, traces, x=TOKENS)
    return figure.update_yaxes(rangemode="tozero")


def comparison(runs: Sequence[History], *, x: str, what: str = "training loss") -> go.Figure:
    """Several runs over one of `X_AXES`: smoothed training loss, or bits per byte of all held-out text."""
    title, unit = f"Runs compared: {what}", "nats per token" if what == "training loss" else "bits per byte"
    figure = go.Figure()
    for i, run in enumerate(runs):
        if what == "training loss":
            rows = thinned(run.train())
            y = "loss_mean"
        else:
            rows, y = run.validation(), "bpb"
            rows = rows[rows.domain == "all"] if len(rows) else rows
        if len(rows) and rows[x].notna().any():
            mode = "lines" if y == "loss_mean" else "lines+markers"
            figure.add_scatter(x=numbers(rows[x]), y=numbers(rows[y]), mode=mode, line=line(i), name=run.name)
    return framed(figure, title, x=X_AXES[x], y=unit, height=400)


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
            trace = go.Scatter(x=rows.tokens, y=numbers(rows[column]), mode="lines+markers", line=line(i), **shown)
            traces.append((panel, trace))
    panels = [Panel(column, UNITS.get(column, column)) for column in numeric]
    return stacked(f"{title}: {name}", panels, traces, x=TOKENS)


UNITS = {"snr_db": "dB", "underflow": "fraction", "saturation": "fraction", "amax": "largest magnitude"}


def questions(runs: Sequence[History]) -> go.Figure:
    """Exact match on held-out questions, by family, next to the majority baseline."""
    title = "Held-out questions, exact match"
    figure = go.Figure()
    for i, run in enumerate(runs):
        scores = (run.summary or {}).get("questions", {})
        if not scores:
            continue
        shares = {f: [100 * s[k] / s["questions"] for k in ("correct", "majority_correct")] for f, s in scores.items()}
        if not figure.data:
            base = [values[1] for values in shares.values()]
            figure.add_bar(x=list(shares), y=base, marker_color=GRID, name="majority baseline")
        right = [values[0] for values in shares.values()]
        figure.add_bar(x=list(shares), y=right, marker_color=line(i)["color"], name=run.name)
    if not figure.data:
        return empty(title, "scored at the end of a run")
    return framed(figure, title, x="question family", y="accuracy, per cent")


def benchmarks(runs: Sequence[History]) -> go.Figure:
    """The latest score of each benchmark, from `metrics/benchmarks`, with the 95% interval of an accuracy or the
    standard error of any other score."""
    title = "Benchmarks"
    figure = go.Figure()
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
        down, up = np.abs(np.array(ends) - last.value.to_numpy()[:, None]).T
        error = {"type": "data", "symmetric": False, "array": numbers(up), "arrayminus": numbers(down)}
        figure.add_bar(x=names, y=numbers(last.value), error_y=error, marker_color=line(i)["color"], name=run.name)
    if not figure.data:
        return empty(title, "no benchmark scores logged")
    return framed(figure, title, x="task, metric", y="score", height=420)
