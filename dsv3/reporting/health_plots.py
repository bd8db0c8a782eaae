"""Plots of the first screen: load of every expert of a layer over tokens, and the vital figures of a run."""

import numpy as np
import plotly.graph_objects as go

from dsv3.reporting.experts import MAP_BELOW, even_scale, nothing
from dsv3.reporting.findings import STEPS, speeds
from dsv3.reporting.history import SMOOTHING, History
from dsv3.reporting.routing_history import SCALARS
from dsv3.reporting.style import TOKENS, Panel, empty, heat, line, numbers, outline, plotted, points, stacked, strided

MOST_INTERVALS = 600
"""Columns of the map; of more intervals, evenly many are shown."""


def load_over_tokens(run: History, layer: str | None, domain: str | None = None) -> go.Figure:
    """Expert x tokens: the load of each expert of a layer, of all tokens or of a domain's."""
    routing = run.routing()
    title = f"Load of each expert, {layer}" + (f", {domain}" if domain else "")
    if layer not in routing.layers:
        return empty("Load of each expert", nothing(run))
    load = routing.layers[layer]
    load_TE = load.domain_TXE[:, routing.domains.index(domain)] if domain in routing.domains else load.load_TE
    at = strided(len(load_TE), MOST_INTERVALS)
    hover = "expert %{y}, about %{x:.3s} tokens: %{z:.2f} relative load<extra></extra>"
    trace = heat(load_TE[at].T, x=numbers(edges(load.tokens_T[at])), hovertemplate=hover, **even_scale())
    height = 150 + min(max(14 * load_TE.shape[1], 240), 520)
    return plotted([trace], title, x=TOKENS, y="expert", height=height, below=MAP_BELOW)


def edges(ends_T: np.ndarray) -> np.ndarray:
    """Where the columns of a map begin and end that stand for the intervals before these places."""
    width = ends_T[1] - ends_T[0] if len(ends_T) > 1 else ends_T[0]
    return np.array([max(ends_T[0] - width, 0), *ends_T])


def vitals(run: History) -> go.Figure:
    """Loss, held-out bits per byte, gradient norm, the worst layer's MaxVio and speed."""
    train, title = run.train(), "Training"
    if train.empty:
        return empty(title, "no training steps logged yet")
    (first, unit), *_ = run.statistics().items()
    scores = run.validation()
    scores = scores[scores.domain == "all"] if len(scores) else scores
    tokens_T, max_vio_T = worst_violation(run)
    speed = speeds(run).rolling(STEPS, min_periods=1).median()
    columns = [
        (Panel(first, unit), train.tokens, train[first].ewm(alpha=1 - SMOOTHING).mean()),
        (Panel("held-out text", "bits/byte"), *((scores.tokens, scores.bpb) if len(scores) else ([], []))),
        (Panel("gradient norm", "L2"), train.tokens, train.get("grad_norm", [])),
        (Panel("MaxVio, worst layer", "MaxVio"), tokens_T, max_vio_T),
        (Panel("speed", "tokens/s"), speed.index, speed),
    ]
    traces = []
    for i, (panel, x, y) in enumerate(columns):
        x, y = outline(np.asarray(x), np.asarray(y))
        mode = "lines" if len(x) > 1 else "markers"
        traces.append((i, points(x, y, mode=mode, line=line(i), name=panel.title, showlegend=False)))
    return stacked(title, [panel for panel, *_ in columns], traces, x=TOKENS, each=100, below=MAP_BELOW)


def worst_violation(run: History) -> tuple[np.ndarray, np.ndarray]:
    """The largest MaxVio of any layer, by the tokens at each interval's end."""
    layers = [load for load in run.routing().layers.values() if len(load.tokens_T)]
    if not layers:
        return np.array([], dtype=int), np.array([])
    last = min(len(load.tokens_T) for load in layers)
    worst_T = np.max([load.scalars_TS[:last, SCALARS.index("max_vio_interval")] for load in layers], axis=0)
    return layers[0].tokens_T[:last], worst_T
