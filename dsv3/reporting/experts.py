"""Expert plots: load of every expert of every layer, balance, bias, domains, co-activation."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from dsv3.monitoring.expert_states import relative
from dsv3.reporting.curves import numbers
from dsv3.reporting.history import History
from dsv3.reporting.style import LOADS, SHARES, SIGNED, TOKENS, TOP, Panel, empty, framed, line, stacked

MAP_BELOW = 52  # pixels below a map, which has no legend
MOST_LINES = 32  # beyond, a map
MOST_LEGENDS = 16  # beyond, the pointer tells which line it is on
MOST_HIGHEST = 6  # layers that are drawn of more than these


def nothing(run: History) -> str:
    """Why there are no figures of experts."""
    dense = run.info.get("experts") == 0
    return "this model has no experts" if dense else "no interval of `callbacks.monitor.every_tokens` is over yet"


def layers(routing: pd.DataFrame) -> list[str]:
    return list(dict.fromkeys(routing.layer)) if len(routing) else []


def moments(routing: pd.DataFrame) -> list[int]:
    """Tokens at the ends of the intervals."""
    return [int(t) for t in dict.fromkeys(routing.tokens)] if len(routing) else []


def load_at(routing: pd.DataFrame, tokens: int) -> np.ndarray:
    """Relative load over the interval that ends at `tokens`, [layers, E]."""
    return np.stack([relative(load) for load in routing[routing.tokens == tokens].load])


def even_scale(title: str = "relative load (1 = balanced)") -> dict[str, Any]:
    return {"colorscale": LOADS, "zmin": 0.0, "zmax": TOP, "colorbar": bar(title)}


def bar(title: str) -> dict[str, Any]:
    return {"title": {"text": title, "side": "right"}, "thickness": 12}


def load(run: History, tokens: int | None = None) -> go.Figure:
    """Layer x expert: load over the interval that ends at `tokens` (None: the last), relative to an even share."""
    routing = run.table("metrics/routing")
    if routing.empty:
        return empty("Load of every expert", nothing(run))
    tokens = moments(routing)[-1] if tokens is None else tokens
    names, values = layers(routing), load_at(routing, tokens)
    hover = "%{y}, expert %{x}: %{z:.2f} relative load (1 = balanced)<extra></extra>"
    figure = go.Figure(go.Heatmap(z=values, y=names, x=np.arange(values.shape[1]), hovertemplate=hover, **even_scale()))
    height = 140 + max(18 * len(names) if len(names) <= 20 else 11 * len(names), 120)
    framed(
        figure,
        f"Load of every expert, up to {tokens:,} tokens",
        x="expert",
        y="MoE layer",
        height=height,
        below=MAP_BELOW,
    )
    figure.update_layout(uirevision="load")
    return figure.update_yaxes(autorange="reversed", type="category")


def load_over_time(run: History, *, most: int = 40) -> go.Figure:
    """`load` with a slider over tokens that needs no server; at most so many moments of it."""
    routing = run.table("metrics/routing")
    figure = load(run)
    if routing.empty:
        return figure
    every = moments(routing)
    kept = [every[i] for i in np.unique(np.linspace(0, len(every) - 1, most).astype(int))]
    figure.frames = [go.Frame(name=f"{t:,}", data=[go.Heatmap(z=load_at(routing, t))]) for t in kept]
    animate = {"mode": "immediate", "frame": {"duration": 0, "redraw": True}, "transition": {"duration": 0}}
    steps = [{"method": "animate", "label": f"{t:,}", "args": [[f"{t:,}"], animate]} for t in kept]
    slider = {"active": len(steps) - 1, "steps": steps, "currentvalue": {"prefix": "up to tokens "}, "pad": {"t": 48}}
    title = {"text": "Load of every expert over the interval before the chosen moment"}
    bottom = figure.layout.height + 60
    return figure.update_layout(sliders=[slider], title=title, height=bottom, margin={"b": 130})


SCALARS = {
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


def by_layer(run: History, columns: Sequence[str], title: str) -> go.Figure:
    """Columns of `metrics/routing` over tokens, a line for each layer; of many, for those that are highest now in the
    first column, and the median of all."""
    routing = run.table("metrics/routing")
    if routing.empty:
        return empty(title, nothing(run))
    if len(layers(routing)) > MOST_LEGENDS:
        title += f", the {MOST_HIGHEST} highest of {len(layers(routing))} layers"
        routing = highest(routing, columns)
    traces = []
    for i, (layer, rows) in enumerate(routing.groupby("layer", sort=False)):
        for panel, column in enumerate(columns):
            shown = {"name": str(layer), "legendgroup": str(layer), "showlegend": panel == 0}
            traces.append((panel, go.Scatter(x=rows.tokens, y=numbers(rows[column]), line=line(i), **shown)))
    return stacked(title, [SCALARS[column] for column in columns], traces, x=TOKENS)


def highest(routing: pd.DataFrame, columns: Sequence[str]) -> pd.DataFrame:
    """Rows of the layers that are highest at the end, and of the median of all layers."""
    last = routing[routing.tokens == routing.tokens.iloc[-1]].nlargest(MOST_HIGHEST, columns[0])
    median = routing.groupby("tokens", as_index=False)[list(columns)].median().assign(layer="median of all")
    return pd.concat([routing[routing.layer.isin(last.layer)], median], ignore_index=True)


def violation(run: History) -> go.Figure:
    return by_layer(run, ["max_vio_interval", "max_vio_step", "max_vio_micro"], "Load balance: MaxVio")


def selection(run: History) -> go.Figure:
    return by_layer(run, ["load_entropy", "gate_entropy", "margin"], "Entropy and margin")


def nodes(run: History) -> go.Figure:
    return by_layer(run, ["group_limited_fraction", "nodes", "dispatch_bytes"], "Nodes and traffic")


def bias(run: History, layer: str | None = None) -> go.Figure:
    """Routing bias of each expert of a layer (None: the first) over tokens: lines, or a map where there are many."""
    routing = run.table("metrics/routing")
    if routing.empty:
        return empty("Routing bias", nothing(run))
    layer = layer or layers(routing)[0]
    rows = routing[routing.layer == layer]
    bias_TE = np.stack(rows.bias.to_list()).astype(np.float32)
    tokens, title = rows.tokens.to_numpy(), f"Routing bias of each expert, {layer}"
    if bias_TE.shape[1] > MOST_LINES:
        limit = float(np.abs(bias_TE).max()) or 1.0
        figure = go.Figure(
            go.Heatmap(z=bias_TE.T, x=tokens, colorscale=SIGNED, zmin=-limit, zmax=limit, colorbar=bar("bias"))
        )
        return framed(figure, title, x=TOKENS, y="expert", height=420, below=MAP_BELOW)
    figure = go.Figure()
    for expert, values in enumerate(bias_TE.T):
        name = f"expert {expert}"
        figure.add_scatter(x=tokens, y=values, line=line(expert) | {"width": 1.2}, name=name, showlegend=False)
    return framed(figure, title, x=TOKENS, y="bias, added to an affinity")


def by_domain(routing: pd.DataFrame) -> tuple[list[str], np.ndarray]:
    """Relative load of each expert on each domain of each layer over the last interval: names of rows, [rows, E]."""
    names, values = [], []
    for row in routing[routing.tokens == moments(routing)[-1]].itertuples():
        load_XE = np.asarray(row.domain_load).reshape(len(row.domains), -1)
        names += [f"{row.layer} · {domain}" for domain in row.domains]
        values += [relative(load_E) for load_E in load_XE]
    return names, np.stack(values)


def specialisation(run: History, title: str = "Specialisation by domain, every layer") -> go.Figure:
    """Relative load of each expert on each domain, over the last interval (the report's Fig. 9)."""
    routing = run.table("metrics/routing")
    if routing.empty:
        return empty(title, nothing(run))
    names, values = by_domain(routing)
    hover = "%{y}, expert %{x}: %{z:.2f} relative load (1 = balanced) of the domain<extra></extra>"
    heatmap = go.Heatmap(z=values, y=names, x=np.arange(values.shape[1]), hovertemplate=hover, **even_scale())
    figure = framed(
        go.Figure(heatmap), title, x="expert", y="", height=140 + max(15 * len(names), 100), below=MAP_BELOW
    )
    return figure.update_yaxes(autorange="reversed", type="category", tickfont={"size": 9})


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


def coactivation(run: History, layer: str | None = None) -> go.Figure:
    """How often two experts serve the same token, against what their loads alone would give (1: independent)."""
    table = run.newest("metrics/coactivation")
    if table.empty:
        return empty("Co-activation of experts", "written down with each checkpoint")
    layer = layer or layers(table)[0]
    pairs = np.asarray(table[table.layer == layer].pairs.iloc[-1], dtype=np.float64)
    pairs_EE = pairs.reshape(int(len(pairs) ** 0.5), -1)
    lift_EE = lift(pairs_EE)
    hover = "experts %{y} and %{x}: lift %{z:.2f}<extra></extra>"
    scale = {"colorscale": SHARES, "zmin": 0.0, "zmax": 2.0, "colorbar": bar("lift")}
    figure = go.Figure(go.Heatmap(z=lift_EE.astype(np.float32), hovertemplate=hover, **scale))
    return framed(figure, f"Co-activation of experts, {layer}", x="expert", y="expert", height=440, below=MAP_BELOW)


def output_norms(run: History) -> go.Figure:
    """Layer x expert: mean L2 norm of an expert's outputs in the step that the last interval measured."""
    routing = run.table("metrics/routing")
    if routing.empty:
        return empty("Norm of expert outputs", nothing(run))
    last = routing[routing.tokens == moments(routing)[-1]]
    values = np.stack([np.asarray(norms, dtype=np.float32) for norms in last.output_norm])
    values[values == 0] = np.nan  # no token came
    heatmap = go.Heatmap(z=values, y=list(last.layer), colorscale=SHARES, zmin=0, colorbar=bar("L2"))
    title, height = "Norm of expert outputs, mean", 140 + max(11 * len(last), 120)
    figure = framed(go.Figure(heatmap), title, x="expert", y="MoE layer", height=height, below=MAP_BELOW)
    return figure.update_yaxes(autorange="reversed", type="category")


def stability(run: History) -> go.Figure:
    """Fraction of a fixed micro-batch's top-K choices unchanged since the previous checkpoint."""
    table = run.table("metrics/stability")
    if table.empty:
        return empty("Routing stability", "compared from the second checkpoint on")
    figure = go.Figure()
    for i, (layer, rows) in enumerate(table.groupby("layer", sort=False)):
        figure.add_scatter(
            x=rows.tokens, y=numbers(100 * rows.unchanged_fraction), mode="lines+markers", line=line(i), name=str(layer)
        )
    figure.update_layout(showlegend=table.layer.nunique() <= MOST_LEGENDS)
    return framed(figure, "Routing stability between checkpoints", x=TOKENS, y="unchanged choices, %")
