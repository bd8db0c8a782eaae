"""Plot style: colours that the colour-blind can tell apart, a unit on every axis, room on a phone."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

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
X_AXES = {"tokens": TOKENS, "seconds": "seconds of training", "flops": "floating-point operations"}


def line(number: int) -> dict[str, Any]:
    """Colour and dash of the n-th line of a plot."""
    return {"color": COLOURS[number % len(COLOURS)], "dash": DASHES[number // len(COLOURS) % len(DASHES)], "width": 1.8}


def framed(
    figure: go.Figure, title: str, *, x: str, y: str, height: int = 340, top: int = 46, below: int = 84
) -> go.Figure:
    """The figure with its title, the labels of both axes and the common look; the legend, if any, stands below."""
    figure.update_layout(
        template=LOOK,
        title={"text": title, "y": 1 - 22 / height},
        height=height,
        margin={"l": 64, "r": 16, "t": top, "b": below},
        legend_y=-44 / (height - top - below),
        uirevision=title,
    )
    if x:
        figure.update_xaxes(title_text=x)
    if y:
        figure.update_yaxes(title_text=y)
    return figure


def empty(title: str, why: str) -> go.Figure:
    """Placeholder for a plot without data yet."""
    figure = framed(go.Figure(), title, x="", y="", height=180)
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False)
    return figure.add_annotation(text=why, showarrow=False, xref="paper", yref="paper", x=0.5, y=0.5)


class Panel(NamedTuple):
    """One of several plots that share an x-axis."""

    title: str
    unit: str


MOST_POINTS = 1500
"""Points of a line that are drawn."""


def outline(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A line in at most `MOST_POINTS` points: of each bundle of points, the lowest and the highest, so that no spike is
    lost; the last point is kept."""
    if len(x) <= MOST_POINTS:
        return x, y
    edges = np.linspace(0, len(x), MOST_POINTS // 2).astype(int)
    values = np.nan_to_num(np.asarray(y, dtype=np.float64), nan=np.inf)
    kept = {i + f(values[i:j]) for i, j in pairwise(edges) for f in (np.argmin, np.argmax)}
    at = np.array(sorted(kept | {len(x) - 1}))
    return x[at], y[at]


def stacked(
    title: str,
    panels: Sequence[Panel],
    traces: Iterable[tuple[int, go.Scatter]],
    *,
    x: str,
    each: int = 150,
    below: int = 84,
) -> go.Figure:
    """Panels one above the other, each so many pixels high; `traces` come with the number of their panel, from 0.
    `below`: pixels for the label of the x-axis and a legend."""
    height = 56 + below + each * len(panels)
    titles = [panel.title for panel in panels]
    gap = 46 / (height - 150)
    figure = make_subplots(rows=len(panels), cols=1, shared_xaxes=True, vertical_spacing=gap, subplot_titles=titles)
    placed = list(traces)
    figure.add_traces([trace for _, trace in placed], rows=[number + 1 for number, _ in placed], cols=[1] * len(placed))
    figure.update_annotations(x=0, xanchor="left", font={"size": 12})
    framed(figure, title, x="", y="", height=height, top=66, below=below)
    for row, panel in enumerate(panels, 1):
        figure.update_yaxes(title_text=panel.unit, title_font={"size": 11}, row=row, col=1)
    return figure.update_xaxes(title_text=x, row=len(panels), col=1)
