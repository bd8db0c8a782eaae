"""Answers to the page: its address, the choices that it offers, and the contents of the view."""

import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from dash import ALL, ClientsideFunction, Dash, Input, Output, State, no_update
from dash.exceptions import PreventUpdate

from dsv3.reporting.dashboard import runs_view
from dsv3.reporting.dashboard.address import Choice, from_search, to_search
from dsv3.reporting.dashboard.held_choices import (
    CHOICES,
    HOLDERS,
    OF_TABLE,
    choice_of,
    held,
    names_of,
    selection,
)
from dsv3.reporting.dashboard.page_layout import grid_options, grid_style
from dsv3.reporting.dashboard.spreadsheet import table_csv
from dsv3.reporting.dashboard.view_contents import draw, save_view, skeleton
from dsv3.reporting.dashboard.watched import Watched
from dsv3.reporting.history import History
from dsv3.reporting.overlay import metrics

PICKERS = ("run", "layer", "domain", "metrics", "group")
MOST_SECONDS = 1.0
"""Of reading rows for the table at once: other questions wait. The rest follows with the next ticks."""
PLACE, PLOT, PART = ({kind: ALL, "run": ALL} for kind in ("place", "plot", "part"))
"""A plot is in its place once it was drawn there."""
DRAWN = {"drawn": ALL}


def add_callbacks(app: Dash, watched: Watched) -> None:
    """Join what the page sends to what answers it."""
    # While an answer is awaited, the next tick is not sent: the browser would drop the answer to the one before.
    waits = [(Output("tick", "disabled"), True, False)]
    # Two callbacks: one that set the controls, too, whenever they change would hold up what waits for them.
    app.callback(
        Output("followed", "data"),
        *(Output(*HOLDERS[name]) for name in Choice._fields if name not in OF_TABLE),
        *(Output(name, "options", allow_duplicate=True) for name in PICKERS),
        Input("address", "search"),
        State("followed", "data"),
        prevent_initial_call="initial_duplicate",
    )(partial(follow, watched))
    app.callback(
        Output("address", "search"),
        Output("followed", "data", allow_duplicate=True),
        *(Input(*HOLDERS[name]) for name in Choice._fields),
        State("address", "search"),
        State("grid", "columnDefs"),
        State("followed", "data"),
        prevent_initial_call=True,
    )(lead)
    app.callback(
        Output("stamp", "data"),
        Input("tick", "n_intervals"),
        State("stamp", "data"),
        State("view", "value"),
        State("run", "value"),
        running=waits,
    )(partial(pulse, watched))
    app.callback(
        *(Output(name, "options") for name in PICKERS),
        *(Output("moment", name) for name in ("min", "marks")),
        Output("grid", "rowData"),
        Output("grid", "columnDefs"),
        Output("grid", "filterModel"),
        Output("grid", "selectedRows", allow_duplicate=True),
        Output("reading", "children"),
        Output("run", "value", allow_duplicate=True),
        Input("stamp", "data"),
        Input("view", "value"),
        Input("run", "value"),
        State("address", "search"),
        State("grid", "columnDefs"),
        *(State(name, "options") for name in PICKERS),
        prevent_initial_call="initial_duplicate",
    )(partial(offer, watched))
    app.callback(
        Output("content", "children"),
        Output("page", "className"),
        Input("view", "value"),
        Input("run", "value"),
        State(DRAWN, "id"),
        State("page", "className"),
        State("seen", "data"),
        *(State(*HOLDERS[name]) for name in CHOICES),
    )(partial(skeleton, watched))
    app.clientside_callback(ClientsideFunction("page", "placed"), Output("placed", "data"), Input(PLACE, "id"))
    app.clientside_callback(
        ClientsideFunction("page", "moved"),
        Output("moves", "data"),
        Input(PLOT, "relayoutData"),
        State("moves", "data"),
        State(DRAWN, "data"),
        prevent_initial_call=True,
    )
    app.callback(
        Output(PLACE, "children"),
        Output(PLOT, "figure"),
        Output(PLOT, "style"),
        Output(PART, "children"),
        Output(DRAWN, "data"),
        Input("stamp", "data"),
        Input("seen", "data"),
        State(PLACE, "id"),
        State(PART, "id"),
        State(DRAWN, "data"),
        State(PLOT, "id"),
        State("moves", "data"),
        *(Input(*HOLDERS[name]) for name in CHOICES),
        running=waits,
    )(partial(draw, watched))
    add_buttons(app, watched)


def add_buttons(app: Dash, watched: Watched) -> None:
    app.callback(
        Output("pinned", "data", allow_duplicate=True),
        Input("pin", "n_clicks"),
        State("grid", "selectedRows"),
        State("pinned", "data"),
        prevent_initial_call=True,
    )(pin)
    app.callback(
        Output("grid", "dashGridOptions"),
        Output("grid", "style"),
        Input("pinned", "data"),
        Input("grid", "rowData"),
        prevent_initial_call=True,
    )(pin_rows)
    app.callback(
        Output("file", "data"),
        Input("save-view", "n_clicks"),
        State(PLACE, "id"),
        *(State(*HOLDERS[name]) for name in CHOICES),
        prevent_initial_call=True,
    )(partial(save_view, watched))
    app.callback(
        Output("file", "data", allow_duplicate=True),
        Input("save-table", "n_clicks"),
        State("grid", "virtualRowData"),
        prevent_initial_call=True,
    )(save_table)


def follow(watched: Watched, search: str | None, followed: str | None) -> list[Any]:
    """Set the controls by the address where they do not follow it yet: when the page begins, or goes back."""
    if (search or "") == followed:
        raise PreventUpdate
    choice = from_search(search or "")
    now = held(choice._replace(run=watched.named(choice.run) or ""))
    # A picker forgets a value that is no option; `offer` comes after this with all of them.
    return [search or "", *now.values(), *(options_of(now[name]) for name in PICKERS)]


def lead(*values_and_state: Any) -> tuple[str, str]:
    """Set the address by the controls, once these have followed it."""
    *values, search, columns, followed = values_and_state
    if (search or "") != followed:
        raise PreventUpdate
    choice = choice_of(dict(zip(Choice._fields, values, strict=True)))
    if not columns:
        asked = from_search(search or "")
        choice = choice._replace(filters=asked.filters, sort=asked.sort)
    if to_search(choice) == followed:
        raise PreventUpdate
    return to_search(choice), to_search(choice)


def options_of(value: Any) -> list[str]:
    """Each once, without what is empty."""
    values = value if isinstance(value, list) else [value]
    return list(dict.fromkeys(each for each in values if each))


def pulse(watched: Watched, tick: Any, before: str | None, view: str, run: str | None) -> str:
    """Differs once something that is shown has changed."""
    found = watched.look()
    runs = list(found.values()) if view == "runs" else [found[run]] if run in found else []
    if view == "study" and run in found:
        runs += watched.study(found[run])
    now = f"{hash((*found, watched.stamp(runs))):x}"
    if now == before:
        raise PreventUpdate
    return now


def offer(
    watched: Watched, changed: Any, view: str, run: str | None, search: str | None, columns: Sequence[Any], *before: Any
) -> list[Any]:
    """What can be chosen: runs, layers, domains, figures, settings to group by; and the table where it is shown."""
    found = watched.look()
    first = watched.newest() if run not in found else no_update
    history = found.get(run or "")
    # Until these are known, no options: a picker would forget what the address says.
    layers: Any = no_update
    domains: Any = no_update
    slider: list[Any] = [no_update, no_update]
    if history is not None and view in ("health", "experts"):
        routing = watched.routing(history)
        layers, domains = list(routing.layers), routing.domains
        if times := routing.moments:
            slider = [-max(len(times) - 1, 1), {0: f"{times[-1]:,}", 1 - len(times): f"{times[0]:,}"}]
    table = table_of(watched, found, search, columns) if view == "runs" else [no_update] * 7
    options = [list(found), layers, domains, *table[:2]]
    changed_options = [no_update if now == then else now for now, then in zip(options, before, strict=True)]
    return [*changed_options, *slider, *table[2:], first]


def table_of(watched: Watched, found: Mapping[str, History], search: str | None, columns: Sequence[Any]) -> list[Any]:
    """Figures and settings to choose from, rows, columns where they are others than now, filters and selection with the
    first rows, and how many runs are still to be read."""
    asked = from_search(search or "")
    # Rows that the address selects or filters must be there when it is followed.
    waits = not columns and (asked.picked or json.loads(asked.filters))
    known = watched.rows(list(found.values()), math.inf if waits else MOST_SECONDS)
    with watched.lock:
        runs = [found[name] for name in known]
        rows, names = runs_view.grid_rows(list(known.values()), runs), metrics(runs)
    now = runs_view.grid_columns(rows, asked.sort)
    settings = [c["headerName"] for c in now if c["field"].startswith("setting ")]
    left = ""
    if len(rows) < len(found):
        left = f"Reading runs: {len(rows):,} of {len(found):,}."
        names, settings = options_of([*names, *asked.metrics]), options_of([*settings, asked.group])
    same = [c["field"] for c in now] == [c["field"] for c in columns]
    first_time = [no_update, no_update] if columns else [json.loads(asked.filters), selection(asked)]
    return [names, settings, rows, no_update if same else now, *first_time, left]


def pin(clicks: int, rows: Any, pinned: list[str]) -> list[str]:
    """Pin the selected runs; where all of them are pinned, unpin them."""
    names = names_of(rows or [])
    if set(names) <= set(pinned):
        return [name for name in pinned if name not in names]
    return list(dict.fromkeys([*pinned, *names]))


def pin_rows(pinned: list[str], rows: list[Any]) -> tuple[dict[str, Any], dict[str, str]]:
    top = [row for row in rows if row["run"] in pinned]
    return grid_options(top), grid_style(len(rows) + len(top))


def save_table(clicks: int, rows: list[Any] | None) -> dict[str, str]:
    return {"content": table_csv(rows or []), "filename": "runs.csv"}
