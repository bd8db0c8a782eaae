"""Expert plots: load of every expert of every layer, balance, bias, domains, co-activation."""

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from dsv3.checkpoint.older_runs import arrow_rows, last_of
from dsv3.monitoring.expert_states import relative
from dsv3.reporting.curves import mode
from dsv3.reporting.history import History
from dsv3.reporting.routing_history import SCALARS, LayerLoad, RoutingHistory
from dsv3.reporting.style import (
    LEFT,
    LOADS,
    MOST_LEGENDS,
    SHARES,
    SIGNED,
    TOKENS,
    TOP,
    Panel,
    empty,
    evenly,
    heat,
    line,
    numbers,
    outline,
    plotted,
    points,
    stacked,
    strided,
)  # fmt: skip

MAP_BELOW = 52  # pixels below a map, which has no legend
MOST_LINES = 32  # beyond, a map
MOST_COLUMNS = 300  # intervals in a map that is half a screen wide
MOST_HIGHEST = 6  # layers that are drawn of more than these


def nothing(run: History) -> str:
    """Why there are no figures of experts."""
    dense = run.info.get("experts") == 0
    return "this model has no experts" if dense else "no interval of `callbacks.monitor.every_tokens` is over yet"


def load_at(routing: RoutingHistory, tokens: int) -> tuple[list[str], np.ndarray]:
    """Layers, and their relative load over the interval that ends at `tokens`, [layers, E]."""
    at = {name: np.searchsorted(load.tokens_T, tokens) for name, load in routing.layers.items()}
    there = [name for name, load in routing.layers.items() if tokens in load.tokens_T[at[name] : at[name] + 1]]
    return there, np.stack([routing.layers[name].load_TE[at[name]] for name in there])


def even_scale(title: str = "relative load (1 = balanced)") -> dict[str, Any]:
    return {"colorscale": LOADS, "zmin": 0.0, "zmax": TOP, "colorbar": bar(title)}


def bar(title: str) -> dict[str, Any]:
    return {"title": {"text": title, "side": "right"}, "thickness": 12}


def load(run: History, tokens: int | None = None) -> go.Figure:
    """Layer x expert: load over the interval that ends at `tokens` (None: the last), relative to an even share."""
    routing = run.routing()
    if not routing.layers:
        return empty("Load of every expert", nothing(run))
    tokens = routing.moments[-1] if tokens is None else tokens
    names, values = load_at(routing, tokens)
    hover = "%{y}, expert %{x}: %{z:.2f} relative load (1 = balanced)<extra></extra>"
    rows = 18 * len(names) if len(names) <= 20 else 11 * len(names)
    height = 140 + max(rows, 170)  # the title of the colour bar is so long
    trace = heat(values, y=names, x=np.arange(values.shape[1]), hovertemplate=hover, **even_scale())
    title = f"Load of every expert, up to {tokens:,} tokens"
    return of_layers(trace, title, height=height, uirevision="load")


def of_layers(
    trace: Mapping[str, Any], title: str, *, x: str = "expert", y: str = "MoE layer", **keys: Any
) -> go.Figure:
    """A map with layers from the top."""
    keys.setdefault("left", 48 + 6 * max(map(len, trace["y"])))
    down = {"autorange": "reversed", "type": "category", **keys.pop("yaxis", {})}
    return plotted([trace], title, x=x, y=y, below=MAP_BELOW, yaxis=down, **keys)


def load_over_time(run: History, *, most: int = 40) -> go.Figure:
    """`load` with a slider over tokens that needs no server; at most so many moments of it."""
    routing = run.routing()
    figure = load(run)
    if not routing.layers:
        return figure
    kept = [routing.moments[i] for i in evenly(len(routing.moments), most)]
    figure.frames = [go.Frame(name=f"{t:,}", data=[go.Heatmap(z=load_at(routing, t)[1])]) for t in kept]
    animate = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    steps = [{"method": "animate", "label": f"{t:,}", "args": [[f"{t:,}"], animate]} for t in kept]
    slider = {"active": len(steps) - 1, "steps": steps, "currentvalue": {"prefix": "up to tokens "}, "pad": {"t": 48}}
    title = {"text": "Load of every expert over the interval before the chosen moment"}
    bottom = figure.layout.height + 60
    return figure.update_layout(sliders=[slider], title=title, height=bottom, margin={"b": 130})


PANELS = {
    "max_vio_interval": Panel("MaxVio of an interval", "MaxVio"),
    "max_vio_step": Panel("MaxVio of an optimiser step, mean", "MaxVio"),
    "max_vio_micro": Panel("MaxVio of a micro-batch, mean", "MaxVio"),
    "load_entropy": Panel("entropy of the load", "of ln E"),
    "gate_entropy": Panel("entropy of a token's gates, mean", "of ln K"),
    "margin": Panel("margin of the selection, mean", "score"),
    "group_limited_fraction": Panel("tokens affected by the group limit", "fraction"),
    "nodes": Panel("nodes per token, mean", "nodes"),
    "dispatch_bytes": Panel("all-to-all traffic implied, both ways", "bytes/token"),
}


def by_layer(run: History, columns: Sequence[str], title: str, *, left: int = LEFT) -> go.Figure:
    """`SCALARS` over tokens, a line for each layer; of many, for those that are highest now in the first column, and
    the median of all."""
    layers = run.routing().layers
    if not layers:
        return empty(title, nothing(run))
    if len(layers) > MOST_LEGENDS:
        title += f", the {MOST_HIGHEST} highest of {len(layers)} layers"
    places = [SCALARS.index(column) for column in columns]
    traces = []
    for i, (name, tokens_T, scalars_TS) in enumerate(shown_scalars(layers, places[0])):
        for panel, place in enumerate(places):
            shown = {"name": name, "legendgroup": name, "showlegend": panel == 0}
            traces.append((panel, points(*outline(tokens_T, scalars_TS[:, place]), line=line(i), **shown)))
    return stacked(title, [PANELS[column] for column in columns], traces, x=TOKENS, left=left)


def shown_scalars(layers: Mapping[str, LayerLoad], place: int) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Name, tokens and scalars of each layer; of many, of those that are highest at the end in the scalar at `place`,
    and the median of all layers."""
    many = len(layers) > MOST_LEGENDS
    last = {name: load.scalars_TS[-1, place] for name, load in layers.items()}
    chosen = sorted(last, key=lambda name: -last[name])[:MOST_HIGHEST] if many else last
    yield from ((name, load.tokens_T, load.scalars_TS) for name, load in layers.items() if name in chosen)
    if many:
        n = min(len(load.tokens_T) for load in layers.values())
        every_LTS = np.stack([load.scalars_TS[:n] for load in layers.values()])
        yield "median of all", next(iter(layers.values())).tokens_T[:n], np.median(every_LTS, axis=0)


def violation(run: History) -> go.Figure:
    return by_layer(run, ["max_vio_interval", "max_vio_step", "max_vio_micro"], "Load balance: MaxVio")


def selection(run: History) -> go.Figure:
    return by_layer(run, ["load_entropy", "gate_entropy", "margin"], "Entropy and margin")


def nodes(run: History) -> go.Figure:
    return by_layer(run, ["group_limited_fraction", "nodes", "dispatch_bytes"], "Nodes and traffic", left=84)


def bias(run: History, layer: str | None = None) -> go.Figure:
    """Routing bias of each expert of a layer (None: the first) over tokens: lines, or a map where there are many."""
    layers = run.routing().layers
    layer = layer or next(iter(layers), "")
    if layer not in layers:
        return empty("Routing bias", nothing(run))
    at = strided(len(layers[layer].tokens_T), MOST_COLUMNS)
    bias_TE, tokens_T = layers[layer].bias_TE[at], layers[layer].tokens_T[at]
    title = f"Routing bias of each expert, {layer}"
    if bias_TE.shape[1] > MOST_LINES:
        limit = float(np.abs(bias_TE).max()) or 1.0
        scale = {"colorscale": SIGNED, "zmin": -limit, "zmax": limit, "colorbar": bar("bias")}
        trace = heat(bias_TE.T, x=numbers(tokens_T), **scale)
        return plotted([trace], title, x=TOKENS, y="expert", height=420, below=MAP_BELOW)
    lines = [
        points(tokens_T, values, line=line(expert) | {"width": 1.2}, name=f"expert {expert}", showlegend=False)
        for expert, values in enumerate(bias_TE.T)
    ]
    return plotted(lines, title, x=TOKENS, y="bias, added to an affinity")


def last_interval(run: History, *columns: str) -> pd.DataFrame:
    """Columns of `metrics/routing` in its last interval."""
    rows = run.newest("metrics/routing", ("tokens", "layer", *columns))
    return rows[rows.tokens == rows.tokens.iloc[-1]] if len(rows) else rows


def by_domain(routing: pd.DataFrame) -> tuple[list[str], np.ndarray]:
    """Relative load of each expert on each domain of each layer, of a `last_interval`: names of rows, [rows, E]."""
    names, values = [], []
    for row in routing.itertuples():
        load_XE = np.asarray(row.domain_load).reshape(len(row.domains), -1)
        names += [f"{row.layer} · {domain}" for domain in row.domains]
        values += [relative(load_E) for load_E in load_XE]
    return names, np.stack(values)


def specialisation(run: History, title: str = "Specialisation by domain, every layer") -> go.Figure:
    """Relative load of each expert on each domain, over the last interval (the report's Fig. 9)."""
    last = last_interval(run, "domains", "domain_load")
    if last.empty:
        return empty(title, nothing(run))
    names, values = by_domain(last)
    hover = "%{y}, expert %{x}: %{z:.2f} relative load (1 = balanced) of the domain<extra></extra>"
    trace = heat(values, y=names, x=np.arange(values.shape[1]), hovertemplate=hover, **even_scale())
    height = 140 + max(15 * len(names), 100)
    return of_layers(trace, title, y="", height=height, yaxis={"tickfont": {"size": 9}})


def lift(pairs_EE: np.ndarray) -> np.ndarray:
    """How often two experts serve one token over what their loads (the diagonal) give by chance: 1 in the mean over
    pairs by chance; nan on the diagonal, 0 for an expert without load."""
    load_E = np.diag(pairs_EE)
    expected_EE = np.outer(load_E, load_E)
    np.fill_diagonal(expected_EE, 0)
    expected_EE *= (pairs_EE.sum() - load_E.sum()) / max(expected_EE.sum(), 1)
    lift_EE = np.divide(pairs_EE, expected_EE, out=np.zeros_like(pairs_EE), where=expected_EE > 0)
    np.fill_diagonal(lift_EE, np.nan)
    return lift_EE


@lru_cache(maxsize=32)
def lift_of(part: Path, changed: int, layer: str | None) -> tuple[str, np.ndarray]:
    """A layer (one that is there) and its `lift`, from a part of `metrics/coactivation`, which has all layers."""
    names = arrow_rows([part], ("layer",))["layer"].to_pylist()
    shown = str(layer if layer in names else names[0])
    pairs = last_of(part, shown, where="layer", column="pairs").values.to_numpy(zero_copy_only=False)
    return shown, lift(pairs.astype(np.float64).reshape(int(len(pairs) ** 0.5), -1))


def coactivation(run: History, layer: str | None = None) -> go.Figure:
    """How often two experts serve the same token, against what their loads alone would give (1: independent)."""
    parts = run.parts("metrics/coactivation")
    if not parts:
        return empty("Co-activation of experts", "written down with each checkpoint")
    layer, lift_EE = lift_of(parts[-1], parts[-1].stat().st_mtime_ns, layer)
    hover = "experts %{y} and %{x}: lift %{z:.2f}<extra></extra>"
    scale = {"colorscale": SHARES, "zmin": 0.0, "zmax": 2.0, "colorbar": bar("lift")}
    trace, title = heat(lift_EE, hovertemplate=hover, **scale), f"Co-activation of experts, {layer}"
    return plotted([trace], title, x="expert", y="expert", height=440, below=MAP_BELOW)


def output_norms(run: History) -> go.Figure:
    """Layer x expert: mean L2 norm of an expert's outputs in the step that the last interval measured."""
    last = last_interval(run, "output_norm")
    if last.empty:
        return empty("Norm of expert outputs", nothing(run))
    values = np.stack([np.asarray(norms, dtype=np.float32) for norms in last.output_norm])
    values[values == 0] = np.nan  # no token came
    trace = heat(values, y=list(last.layer), colorscale=SHARES, zmin=0, colorbar=bar("L2"))
    return of_layers(trace, "Norm of expert outputs, mean", height=140 + max(11 * len(last), 120))


def unchanged(run: History) -> pd.DataFrame:
    return run.table("metrics/stability", ("tokens", "layer", "unchanged_fraction"))


def stability(run: History) -> go.Figure:
    """Fraction of a fixed micro-batch's top-K choices unchanged since the previous checkpoint: a line for each layer,
    or a map where there are many."""
    table, title = unchanged(run), "Routing stability between checkpoints"
    if table.empty:
        return empty(title, "compared from the second checkpoint on")
    place, names = pd.factorize(table.layer)
    if len(names) > MOST_LEGENDS:
        tokens_T, moment = np.unique(table.tokens, return_inverse=True)
        kept_LT = np.full((len(names), len(tokens_T)), np.nan)
        kept_LT[place, moment] = 100 * table.unchanged_fraction
        at = strided(len(tokens_T), MOST_COLUMNS)
        scale = {"zmin": 0, "zmax": 100, "colorscale": SHARES, "colorbar": bar("unchanged choices, %")}
        trace = heat(kept_LT[:, at], y=list(names), x=numbers(tokens_T[at]), **scale)
        return of_layers(trace, title, x=TOKENS, height=140 + max(6 * len(names), 240))
    traces = []
    for i, (layer, rows) in enumerate(table.groupby("layer", sort=False)):
        x, y = outline(rows.tokens.to_numpy(), 100 * rows.unchanged_fraction.to_numpy())
        traces.append(points(x, y, mode=mode(rows), line=line(i), name=str(layer)))
    return plotted(traces, title, x=TOKENS, y="unchanged choices, %")
