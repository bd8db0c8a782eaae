"""Plot style: colours that the colour-blind can tell apart, a unit on every axis, room on a phone."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from dsv3.reporting.palette import COLOURS

DASHES = ("solid", "dash", "dot", "dashdot")  # once the colours are used up
SHARES = "Cividis"  # 0 and up
TOP = 3.0
"""End of the scale of relative loads; more is shown in its last colour."""
LOADS = [
    (0.0, "#c4161c"),  # dead
    (0.01 / TOP, "#c4161c"),
    (0.0101 / TOP, "#f28e2b"),  # from here to 0.25: starved
    (0.25 / TOP, "#fbc48a"),
    (0.2501 / TOP, "#fdebd9"),
    (1.0 / TOP, "#f7f7f7"),  # balanced
    (2.0 / TOP, "#92b5de"),
    (2.001 / TOP, "#4a83c4"),  # hot
    (1.0, "#08306b"),
]
"""Relative load: its steps are where the state of an expert changes (`dsv3.monitoring.expert_states`)."""
SIGNED = "PuOr"  # about 0
INK, PAPER, GRID = "#1b1f24", "#ffffff", "#e3e6ea"
TOKENS = "training tokens"
NO_UPLOAD: Any = {
    "displaylogo": False,
    "plotlyServerURL": "",
    "modeBarButtonsToRemove": ["sendChartToCloud", "sendDataToCloud"],
}
"""Plotly's settings without its logo and without the buttons that upload a chart to its makers."""
LEFT = 64
"""Pixels for the labels of a y-axis."""
RIGHT = 16
OF_BAR = 112
"""Pixels for a colour bar: thickness, labels and title."""
AXIS = {"title": {"standoff": 8}, "gridcolor": GRID, "zeroline": False, "automargin": True, "ticks": ""}
LOOK = go.layout.Template(
    layout={
        "title": {"x": 0.01, "xanchor": "left", "font": {"size": 15}},
        "paper_bgcolor": PAPER,
        "plot_bgcolor": PAPER,
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": INK},
        "legend": {"orientation": "h", "x": 0, "yanchor": "top", "font": {"size": 11}},
        "hoverlabel": {"namelength": -1},
        "xaxis": AXIS,
        "yaxis": AXIS,
    },
    data={"heatmap": [{"colorbar": {"outlinewidth": 0, "ticks": ""}}]},
)
"""What all plots have in common, in place of Plotly's own."""
LOOK_AS_DICT = LOOK.to_plotly_json()
X_AXES = {"tokens": TOKENS, "seconds": "seconds of training", "flops": "floating-point operations"}


MOST_LEGENDS = 16
"""Lines that a legend names; of more, which would hide the plot, the pointer tells which line it is on."""


def few(names: Iterable[Any]) -> bool:
    """Whether a legend has room for them."""
    return len({*names}) <= MOST_LEGENDS


def legend(traces: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the layout: hides a legend that has no room for the traces' names, and leaves the choice to Plotly else."""
    return {} if few(trace.get("name") for trace in traces) else {"showlegend": False}


def line(number: int) -> dict[str, Any]:
    """Colour and dash of the n-th line of a plot."""
    return {"color": COLOURS[number % len(COLOURS)], "dash": DASHES[number // len(COLOURS) % len(DASHES)], "width": 1.8}


def framed(
    figure: go.Figure, title: str, *, x: str, y: str, height: int = 340, top: int = 46, below: int = 84
) -> go.Figure:
    """The figure with its title, the labels of both axes and the common look; the legend, if any, stands below."""
    figure.update_layout(template=LOOK, **frame(title, height=height, top=top, below=below))
    figure.update_layout(legend(trace.to_plotly_json() for trace in figure.data))
    if x:
        figure.update_xaxes(title_text=x)
    if y:
        figure.update_yaxes(title_text=y)
    return figure


def frame(title: str, *, height: int, top: int, below: int, left: int = LEFT, right: int = RIGHT) -> dict[str, Any]:
    """Title and margins of a plot, in pixels. One that lacks room for its labels or its colour bar is drawn twice."""
    return {
        "title": {"text": title, "y": 1 - 22 / height},
        "height": height,
        "margin": {"l": left, "r": right, "t": top, "b": below},
        "legend": {"y": -44 / (height - top - below)},
        "uirevision": title,
    }


def plotted(
    traces: Iterable[Mapping[str, Any]], title: str, *, x: str, y: str, height: int = 340, top: int = 46,
    below: int = 84, left: int = LEFT, xaxis: Mapping[str, Any] | None = None,
    yaxis: Mapping[str, Any] | None = None, **more: Any,
) -> go.Figure:  # fmt: skip
    """Traces (`points`, `heat`) as `framed` frames them. xaxis, yaxis, more: other keys of the layout."""
    axes = {"xaxis": {"title": {"text": x}, **(xaxis or {})}, "yaxis": {"title": {"text": y}, **(yaxis or {})}}
    traces = list(traces)
    right = OF_BAR if any("colorbar" in trace for trace in traces) else RIGHT
    return drawn(traces, frame(title, height=height, top=top, below=below, left=left, right=right) | axes | more)


def drawn(traces: Iterable[Mapping[str, Any]], layout: Mapping[str, Any]) -> go.Figure:
    """A figure in the common look whose parts Plotly does not check, which takes it longer than all else."""
    traces = list(traces)
    return go.Figure(traces, {"template": LOOK_AS_DICT, **legend(traces), **layout}, _validate=False)


def points(x: Any, y: Any, **keys: Any) -> dict[str, Any]:
    """A line or points."""
    return {"type": "scatter", "x": numbers(x), "y": numbers(y), **keys}


def heat(values: Any, **keys: Any) -> dict[str, Any]:
    """A map, [y, x]."""
    return {"type": "heatmap", "z": numbers(values), **keys}


def numbers(column: Any) -> np.ndarray:
    """A column as plotly takes it in the fewest bytes; single precision is finer than a screen."""
    values = np.asarray(column)
    if values.dtype.kind == "f":
        return values.astype(np.float32)
    if values.dtype.kind in "iu" and values.size and values.max() >= 2**31:  # plotly.js has no such integers
        return values.astype(np.float64)
    return values


def evenly(number: int, most: int) -> np.ndarray:
    """At most so many of 0 ... number - 1, evenly apart, the last one among them."""
    return np.unique(np.linspace(0, number - 1, min(most, number)).astype(int))


def strided(number: int, most: int) -> np.ndarray:
    """As `evenly`, all equally far apart: a browser draws a map with such columns in a tenth of the time."""
    step = max(-(-number // most), 1)
    return np.arange((number - 1) % step, number, step)


def empty(title: str, why: str) -> go.Figure:
    """Placeholder for a plot without data yet."""
    hidden = {"visible": False}
    text = {"text": why, "showarrow": False, "xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5}
    return plotted([], title, x="", y="", height=180, xaxis=hidden, yaxis=hidden, annotations=[text])


class Panel(NamedTuple):
    """One of several plots that share an x-axis."""

    title: str
    unit: str


MOST_POINTS = 1500
"""Points of a line that are drawn."""
MOST_MARKERS = 60
"""Points of a line that are marked."""


def outline(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A line in at most `MOST_POINTS` points: of each bundle of points, the lowest and the highest, so that no spike is
    lost; the last point is kept."""
    if len(x) <= MOST_POINTS:
        return x, y
    size = -(-len(x) // (MOST_POINTS // 2 - 1))
    values = np.nan_to_num(np.asarray(y, dtype=np.float64), nan=np.inf)
    bundles = np.pad(values, (0, -len(values) % size), mode="edge").reshape(-1, size)
    first = np.arange(len(bundles)) * size
    at = np.unique([*(first + bundles.argmin(1)), *(first + bundles.argmax(1)), len(x) - 1])
    return x[at], y[at]


def stacked(
    title: str,
    panels: Sequence[Panel],
    traces: Iterable[tuple[int, Mapping[str, Any]]],
    *,
    x: str,
    each: int = 150,
    below: int = 84,
    left: int = LEFT,
    axes: Mapping[str, Mapping[str, Any]] | None = None,
    **more: Any,
) -> go.Figure:
    """Panels one above the other, each so many pixels high; `traces` come with the number of their panel, from 0.

    below, left: pixels for the label of the x-axis and a legend, and for the labels of the y-axes. axes: other keys of
    every `xaxis` and `yaxis`. more: of the layout."""
    number, top = len(panels), 66
    height = 56 + below + each * number
    gap = 46 / (height - 150)
    high = (1 - gap * (number - 1)) / number
    frame_ = frame(title, height=height, top=top, below=below, left=left)
    given = axes or {}
    layout: dict[str, Any] = frame_ | {"annotations": []} | more
    layout["xaxis"] = {"anchor": f"y{suffix(number - 1)}", "title": {"text": x}, **given.get("xaxis", {})}
    for place, panel in enumerate(panels):
        end = 1 - place * (high + gap)
        domain = [max(end - high, 0.0), end]
        unit = {"text": panel.unit, "font": {"size": 11}}
        layout[f"yaxis{suffix(place)}"] = {"anchor": "x", "domain": domain, "title": unit, **given.get("yaxis", {})}
        layout["annotations"].append(
            {"text": panel.title, "x": 0, "xanchor": "left", "xref": "paper", "y": end, "yanchor": "bottom",
             "yref": "paper", "showarrow": False, "font": {"size": 12}}
        )  # fmt: skip
    placed = [{**trace, "yaxis": f"y{suffix(place)}"} for place, trace in traces]
    return drawn(placed, layout)


def suffix(place: int) -> str:
    """Of the names of a panel's axes."""
    return str(place + 1) if place else ""
