"""The live dashboard: a page on loopback that reads run folders again every few seconds."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import plotly.graph_objects as go
from dash import Dash, Input, Output, State, ctx, dcc, html, no_update
from dash.exceptions import PreventUpdate
from flask import Flask, Response, request

from dsv3.reporting import curves, experts
from dsv3.reporting.history import History, find_runs
from dsv3.reporting.overview import overview
from dsv3.reporting.page import (
    ALERT_HEADERS,
    CSS,
    NO_ALERTS,
    SPIKE_HEADERS,
    alert_rows,
    shown,
    spike_rows,
    spike_text,
    spike_title,
)
from dsv3.reporting.style import NO_UPLOAD, X_AXES

REFRESH_SECONDS = 4
OWN_HOSTS = ("127.0.0.1", "localhost", "::1")
DASH_CSS = """
.top { display: flex; flex-wrap: wrap; gap: 8px 20px; align-items: baseline; }
.controls { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 240px), 1fr)); gap: 8px 16px; }
.controls label, .label { font-size: 13px; color: #57606a; }
.slider { padding: 4px 12px 20px; }
"""


class Runs:
    """The runs in a folder, found again at each look; what was read of one is kept."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.known: dict[str, History] = {}

    def look(self) -> dict[str, History]:
        for run in find_runs(self.root):
            self.known.setdefault(run.name, run)
        self.known = {name: run for name, run in self.known.items() if run.folder.config_path.exists()}
        return self.known

    def get(self, name: str | None) -> History | None:
        return self.look().get(name or "")


def build_app(root: Path) -> Dash:
    """The Dash application; nothing is fetched from elsewhere."""
    runs = Runs(root)
    app = Dash(__name__, title="dsv3", update_title="", serve_locally=True, add_log_handler=False)
    style = f"<style>{CSS}{DASH_CSS}</style></head>"
    app.index_string = app.index_string.replace("</head>", style).replace(
        "{%favicon%}", '<link rel="icon" href="data:,">'
    )
    protect(app.server)
    app.layout = lambda: layout(runs)
    add_callbacks(app, runs)
    return app


def protect(server: Flask) -> None:
    """Answer this machine's own pages alone: a foreign site that has its name resolve to 127.0.0.1 is refused, and so
    is being shown in another page's frame."""

    @server.before_request
    def refuse_other_hosts() -> tuple[str, int] | None:
        host = urlsplit(f"//{request.host}").hostname
        return None if host in OWN_HOSTS else ("This page answers at http://127.0.0.1 and http://localhost only.", 403)

    @server.after_request
    def forbid_framing(response: Response) -> Response:
        response.headers["Content-Security-Policy"] = "frame-ancestors 'none'"
        response.headers["X-Content-Type-Options"] = "nosniff"
        response.headers["Referrer-Policy"] = "no-referrer"
        return response


def layout(runs: Runs) -> html.Div:
    names = list(runs.look())
    newest = max(names, key=lambda name: runs.known[name].folder.config_path.stat().st_mtime, default=None)
    return html.Div(
        [
            dcc.Interval(id="tick", interval=REFRESH_SECONDS * 1000),
            dcc.Interval(id="redraw", interval=REFRESH_SECONDS * 1000),
            html.Div([html.H1(f"Runs in {runs.root}"), html.Span(id="state")], className="top"),
            html.Div(
                [
                    control("Run", dcc.Dropdown(names, newest, id="run", clearable=False)),
                    control("Compare with", dcc.Dropdown(names, [], id="others", multi=True)),
                    control("Compare over", dcc.Dropdown(list(X_AXES), "tokens", id="x", clearable=False)),
                    control("Layer", dcc.Dropdown([], None, id="layer", clearable=False)),
                ],
                className="controls",
            ),
            html.Div(id="runs", className="scroll"),
            html.H2("Alerts"),
            html.Div(id="alerts"),
            html.H2("Training"),
            grid("loss", "held_out", "figures", "rates", "questions"),
            grid("compared_loss", "compared_bpb"),
            html.Div(graph("benchmarks"), className="wide"),
            html.H2("Experts"),
            html.Div(graph("load"), className="wide"),
            html.Div(
                [
                    html.Span("Interval ending at (tokens)", className="label"),
                    dcc.Slider(0, 1, 1, value=1, id="moment", marks=None, allow_direct_input=False),
                ],
                className="slider",
            ),
            grid("violation", "selection", "bias", "coactivation"),
            html.Div(graph("specialisation"), className="wide"),
            grid("nodes", "stability"),
            html.Div(graph("output_norms"), className="wide"),
            html.H2("Numeric formats"),
            html.Div(graph("formats"), className="wide"),
            dcc.Store(id="drawn"),
        ]
    )


def control(label: str, element: Any) -> html.Div:
    return html.Div([html.Label(label), element])


def graph(name: str) -> dcc.Graph:
    return dcc.Graph(id={"plot": name}, responsive=True, config=NO_UPLOAD, style={"height": "180px"})


def grid(*names: str) -> html.Div:
    return html.Div([html.Div(graph(name), className="card") for name in names], className="grid")


Plot = Callable[[Sequence[History], str, str | None], go.Figure]

PLOTS: dict[str, Plot] = {
    "loss": lambda runs, x, layer: curves.loss(runs[0]),
    "held_out": lambda runs, x, layer: curves.held_out(runs[0]),
    "figures": lambda runs, x, layer: curves.figures(runs[0]),
    "rates": lambda runs, x, layer: curves.rates(runs[0]),
    "questions": lambda runs, x, layer: curves.questions(runs),
    "benchmarks": lambda runs, x, layer: curves.benchmarks(runs),
    "compared_loss": lambda runs, x, layer: curves.comparison(runs, x=x),
    "compared_bpb": lambda runs, x, layer: curves.comparison(runs, x=x, what="held-out text"),
    "violation": lambda runs, x, layer: experts.violation(runs[0]),
    "selection": lambda runs, x, layer: experts.selection(runs[0]),
    "nodes": lambda runs, x, layer: experts.nodes(runs[0]),
    "bias": lambda runs, x, layer: experts.bias(runs[0], layer),
    "coactivation": lambda runs, x, layer: experts.coactivation(runs[0], layer),
    "specialisation": lambda runs, x, layer: experts.specialisation(runs[0]),
    "stability": lambda runs, x, layer: experts.stability(runs[0]),
    "output_norms": lambda runs, x, layer: experts.output_norms(runs[0]),
    "formats": lambda runs, x, layer: curves.formats(runs[0]),
}
"""Every plot but the load's: from the run (first) and those it is compared with, the x-axis, and the layer."""


def add_callbacks(app: Dash, runs: Runs) -> None:
    """Join what the page sends to what answers it."""
    app.callback(
        Output("runs", "children"),
        Output("run", "options"),
        Output("others", "options"),
        Output("state", "children"),
        Input("tick", "n_intervals"),
        Input("run", "value"),
    )(partial(list_runs, runs))
    app.callback(
        Output("layer", "options"),
        Output("layer", "value"),
        Output("moment", "max"),
        Output("moment", "value"),
        Output("moment", "marks"),
        Input("tick", "n_intervals"),
        Input("run", "value"),
        State("layer", "value"),
        State("moment", "value"),
        State("moment", "max"),
        State("moment", "marks"),
    )(partial(offer, runs))
    app.callback(
        Output({"plot": "load"}, "figure"),
        Output({"plot": "load"}, "style"),
        Input("moment", "value"),
        Input("run", "value"),
    )(partial(draw_load, runs))
    app.callback(
        *(Output({"plot": name}, "figure") for name in PLOTS),
        *(Output({"plot": name}, "style") for name in PLOTS),
        Output("alerts", "children"),
        Output("drawn", "data"),
        Input("redraw", "n_intervals"),
        Input("run", "value"),
        Input("others", "value"),
        Input("x", "value"),
        Input("layer", "value"),
        State("drawn", "data"),
        # A newer request of a callback makes the browser drop the older one's answer: while plots take longer than an
        # interval, the next is not asked for.
        running=[(Output("redraw", "disabled"), True, False)],
    )(partial(draw, runs))


def list_runs(runs: Runs, tick: Any, name: str | None) -> Any:
    """The table of runs, the choices of one and of others, and how far the chosen one is."""
    found = runs.look()
    run = found.get(name or "")
    state = f"{run.name}: {run.state}, {run.tokens:,} tokens" if run else "no runs yet"
    return runs_table(list(found.values())), list(found), [other for other in found if other != name], state


def offer(
    runs: Runs, tick: Any, name: str | None, layer: str | None, moment: int, last: int, known: dict[str, str] | None
) -> Any:
    """Layers and moments of the run; the slider follows new moments while it stands at the last one."""
    run = runs.get(name)
    routing = run.table("metrics/routing") if run else None
    if routing is None or routing.empty:
        return [], None, 1, 0, {}
    names, times = experts.layers(routing), experts.moments(routing)
    newest = len(times) - 1
    end = max(newest, 1)  # a slider has two ends
    follows = ctx.triggered_id == "run" or moment >= last or last > end
    marks = {i: f"{times[i]:,}" for i in sorted({0, newest // 2, newest})}
    kept = layer if layer in names else names[0]
    # Where there is no new moment to follow, a late answer must not take back the one that was chosen since.
    new = ctx.triggered_id == "run" or newest != max(map(int, known or {}), default=-1)
    return names, kept, end, end if follows and new else no_update, marks


def draw_load(runs: Runs, moment: int, name: str | None) -> Any:
    """Every expert's load up to the chosen moment."""
    run = runs.get(name)
    if run is None:
        raise PreventUpdate
    times = experts.moments(run.table("metrics/routing"))
    figure = experts.load(run, times[min(moment, len(times) - 1)] if times else None)
    return figure, height_of(figure)


def draw(
    runs: Runs, tick: Any, name: str | None, others: list[str] | None, x: str, layer: str | None, drawn: Any
) -> Any:
    """All other plots, where a choice changed or one of the runs has gone on."""
    found = runs.look()
    chosen = [found[each] for each in [name, *(others or [])] if each in found]
    now = [x, layer, *(f"{run.name} {run.state} {run.tokens}" for run in chosen)]
    if not chosen or now == drawn:
        raise PreventUpdate
    figures = [plot(chosen, x, layer) for plot in PLOTS.values()]
    return [*figures, *map(height_of, figures), found_in(chosen[0]), now]


def height_of(figure: go.Figure) -> dict[str, str]:
    """The place that a plot takes: its own height, and the width that the screen has for it."""
    return {"height": f"{figure.layout.height}px"}


def runs_table(runs: Sequence[History]) -> html.Div:
    keys = {
        "run": "run",
        "state": "state",
        "tokens": "tokens",
        "planned": "planned tokens",
        "bpb": "held-out bits per byte",
        "max_violation": "MaxVio",
        "worst_layer": "in layer",
    }
    rows = [overview(run) for run in runs]
    return table(list(keys.values()), [[row[key] for key in keys] for row in rows])


def found_in(run: History) -> list[Any]:
    """The alerts, and the documents of each batch that the guard logged."""
    rows = alert_rows(run)
    content: list[Any] = [table(ALERT_HEADERS, rows) if rows else html.P(NO_ALERTS)]
    for spike in run.spikes():
        content += [html.H2(spike_title(spike)), html.P(spike_text(spike)), table(SPIKE_HEADERS, spike_rows(spike))]
    return content


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> html.Div:
    def cell(value: Any) -> html.Td:
        text = shown(value)
        return html.Td(text, className="text" if len(text) > 24 else None)

    head = html.Thead(html.Tr([html.Th(header) for header in headers]))
    body = html.Tbody([html.Tr([cell(value) for value in row]) for row in rows])
    return html.Div(html.Table([head, body]), className="scroll")
