"""Answers to the page: its address, the choices that it offers, and the contents of the view."""

import json
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from dash import ALL, Dash, Input, Output, State, ctx, dcc, html, no_update
from dash.exceptions import PreventUpdate

from dsv3.reporting.dashboard import experts_view, health_view, runs_view, study_view, training_view
from dsv3.reporting.dashboard.address import Choice, from_search, to_search
from dsv3.reporting.dashboard.drawing import View, figure_and_style, redrawn, scene_of, text_of, zoomed
from dsv3.reporting.dashboard.page_layout import grid_options, grid_style
from dsv3.reporting.dashboard.spreadsheet import figures_csv, table_csv
from dsv3.reporting.dashboard.watched import Watched, stamp
from dsv3.reporting.overlay import metrics

VIEWS: dict[str, View] = {
    "health": health_view.VIEW,
    "training": training_view.VIEW,
    "experts": experts_view.VIEW,
    "runs": runs_view.VIEW,
    "study": study_view.VIEW,
}
PARTS = {name: part for view in VIEWS.values() for name, part in view.drawn.items()}
HOLDERS = {
    **{name: (name, "value") for name in Choice._fields},
    "picked": ("grid", "selectedRows"),
    "pinned": ("pinned", "data"),
    "filters": ("grid", "filterModel"),
    "sort": ("grid", "columnState"),
}
"""Which property of which element holds a choice."""
PICKERS = ("run", "layer", "domain", "metrics", "group")
OF_TABLE = ("filters", "sort")
"""Choices that the table gets with its columns: one without columns forgets them."""
PLOT, PART, DRAWN = {"plot": ALL, "run": ALL}, {"part": ALL, "run": ALL}, {"drawn": ALL}
CHOICES = [name for name in Choice._fields if name not in ("view", "run", *OF_TABLE)]
"""That the contents of a view depend on; for view and run the page gets a new skeleton."""


def add_callbacks(app: Dash, watched: Watched) -> None:
    """Join what the page sends to what answers it."""
    # While an answer is awaited, the next tick is not sent: the browser would drop the answer to the one before.
    waits = [(Output("tick", "disabled"), True, False)]
    app.callback(
        Output("address", "search"),
        Output("followed", "data"),
        *(Output(*HOLDERS[name]) for name in Choice._fields if name not in OF_TABLE),
        *(Output(name, "options", allow_duplicate=True) for name in PICKERS),
        Input("address", "search"),
        *(Input(*HOLDERS[name]) for name in Choice._fields),
        State("grid", "columnDefs"),
        State("followed", "data"),
        prevent_initial_call="initial_duplicate",
    )(partial(follow, watched))
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
        Output("run", "value", allow_duplicate=True),
        Input("stamp", "data"),
        Input("view", "value"),
        Input("run", "value"),
        State("address", "search"),
        State("grid", "columnDefs"),
        prevent_initial_call="initial_duplicate",
    )(partial(offer, watched))
    app.callback(
        Output("content", "children"),
        Output("page", "className"),
        Input("view", "value"),
        Input("run", "value"),
        State(DRAWN, "id"),
        State("page", "className"),
    )(skeleton)
    app.callback(
        Output(PLOT, "figure"),
        Output(PLOT, "style"),
        Output(PART, "children"),
        Output(DRAWN, "data"),
        Input("stamp", "data"),
        Input(PLOT, "id"),
        Input(PART, "id"),
        State(DRAWN, "data"),
        State(PLOT, "relayoutData"),
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
        State(PLOT, "id"),
        *(State(*HOLDERS[name]) for name in CHOICES),
        prevent_initial_call=True,
    )(partial(save_view, watched))
    app.callback(
        Output("file", "data", allow_duplicate=True),
        Input("save-table", "n_clicks"),
        State("grid", "virtualRowData"),
        prevent_initial_call=True,
    )(save_table)


def choice_of(values: Mapping[str, Any]) -> Choice:
    """From what the elements of the page hold; None: nothing is chosen."""
    given = {name: value for name, value in values.items() if value is not None}
    if "picked" in given:
        given["picked"] = names_of(given["picked"])
    if "filters" in given:
        given["filters"] = json.dumps(given["filters"])
    if "sort" in given:
        given["sort"] = sorted_by(given["sort"])
    for name in ("pinned", "metrics", "log"):
        if name in given:
            given[name] = tuple(given[name])
    return Choice(**given)


def selection(choice: Choice) -> Any:
    """The picked rows, as the table takes them."""
    return {"ids": list(choice.picked)} if choice.picked else []


def names_of(rows: Any) -> tuple[str, ...]:
    """Runs of the selected rows, or of a selection that this page made."""
    return tuple(rows["ids"]) if isinstance(rows, Mapping) else tuple(row["run"] for row in rows)


def sorted_by(columns: Sequence[Mapping[str, Any]]) -> str:
    sorting = [("-" if c.get("sort") == "desc" else "") + c["colId"] for c in columns if c.get("sort")]
    return sorting[0] if sorting else ""


def held(choice: Choice) -> dict[str, Any]:
    """What the elements of the page hold for a choice."""
    values: dict[str, Any] = {name: value or None for name, value in choice._asdict().items() if name not in OF_TABLE}
    values["picked"] = selection(choice)
    values |= {"moment": choice.moment, "smooth": choice.smooth}
    values |= {name: list(getattr(choice, name)) for name in ("pinned", "metrics", "log")}
    return values


def follow(watched: Watched, search: str | None, *values_and_columns: Any) -> Any:
    """Set the controls by the address where they do not follow it yet: when the page begins, or goes back. Otherwise
    the address by the controls.

    What triggered this does not tell: of two requests at once, the browser drops the answer to the first.
    """
    *values, columns, followed = values_and_columns
    if (search or "") != followed:
        choice = from_search(search or "")
        run = choice.run if choice.run in watched.look() else watched.newest()
        now = held(choice._replace(run=run or ""))
        # A picker forgets a value that is no option; `offer` comes after this with all of them.
        return [no_update, search or "", *now.values(), *(options_of(now[name]) for name in PICKERS)]
    choice = choice_of(dict(zip(Choice._fields, values, strict=True)))
    if not columns:
        asked = from_search(search or "")
        choice = choice._replace(filters=asked.filters, sort=asked.sort)
    return [to_search(choice), to_search(choice), *[no_update] * (len(Choice._fields) - len(OF_TABLE) + len(PICKERS))]


def options_of(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value] if value else []


def pulse(watched: Watched, tick: Any, before: str | None, view: str, run: str | None) -> str:
    """Differs once something that is shown has changed."""
    found = watched.look()
    runs = list(found.values()) if view == "runs" else [found[run]] if run in found else []
    if view == "study" and run in found:
        runs += watched.study(found[run])
    now = f"{hash((*found, *map(stamp, runs))):x}"
    if now == before:
        raise PreventUpdate
    return now


def offer(
    watched: Watched, changed: Any, view: str, run: str | None, search: str | None, columns: Sequence[Any]
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
    table: list[Any] = [no_update] * 6
    if view == "runs":
        with watched.lock:
            rows, names = runs_view.grid_rows(watched), metrics(list(found.values()))
        asked = from_search(search or "")
        now = runs_view.grid_columns(rows, asked.sort)
        settings = [c["headerName"] for c in now if c["field"].startswith("setting ")]
        same = [c["field"] for c in now] == [c["field"] for c in columns]
        # The first rows come with what the address says of them.
        first_time = [no_update, no_update] if columns else [json.loads(asked.filters), selection(asked)]
        table = [names, settings, rows, no_update if same else now, *first_time]
    return [list(found), layers, domains, *table[:2], *slider, *table[2:], first]


def skeleton(view: str | None, run: str | None, there: list[Any], shown: str) -> tuple[Any, str]:
    """The elements of a view, not yet drawn. Those that are there are left as they are: plots keep their zoom."""
    if view is None or (there == [{"drawn": run}] and shown == f"view-{view}"):
        raise PreventUpdate
    if not run:
        return html.P("There are no runs in this folder yet."), f"view-{view}"
    return [dcc.Store(id={"drawn": run}, data={}), *VIEWS[view].skeleton(run)], f"view-{view}"


def draw(
    watched: Watched, changed: Any, plots: list[Any], parts: list[Any], known: list[Any], moved: list[Any], *values: Any
) -> list[list[Any]]:
    """All plots and parts of the view that are not up to date. A plot keeps its zoom while its run goes on."""
    ids = [*plots, *parts]
    scene = scene_of(watched, ids[0]["run"], choice_of(dict(zip(CHOICES, values, strict=True)))) if ids else None
    if scene is None:
        raise PreventUpdate
    names = [each.get("plot") or each["part"] for each in ids]
    made, now = redrawn(watched, scene, PARTS, names, known[0] or {})
    if not made:
        raise PreventUpdate
    kept = moved if ctx.triggered_id == "stamp" else [None] * len(plots)
    figures = [figure_and_style(zoomed(made.get(each["plot"]), m)) for each, m in zip(plots, kept, strict=True)]
    texts = [text_of(made[each["part"]]) if each["part"] in made else no_update for each in parts]
    watched.ahead.asked(watched.look(), scene.run.name)
    return [[figure for figure, _ in figures], [style for _, style in figures], texts, [now]]


def pin(clicks: int, rows: Any, pinned: list[str]) -> list[str]:
    """Pin the selected runs; where all of them are pinned, unpin them."""
    names = names_of(rows or [])
    if set(names) <= set(pinned):
        return [name for name in pinned if name not in names]
    return list(dict.fromkeys([*pinned, *names]))


def pin_rows(pinned: list[str], rows: list[Any]) -> tuple[dict[str, Any], dict[str, str]]:
    top = [row for row in rows if row["run"] in pinned]
    return grid_options(top), grid_style(len(rows) + len(top))


def save_view(watched: Watched, clicks: int, plots: list[Any], *values: Any) -> dict[str, str]:
    """The figures of the plots that are shown."""
    scene = scene_of(watched, plots[0]["run"], choice_of(dict(zip(CHOICES, values, strict=True)))) if plots else None
    if scene is None:
        raise PreventUpdate
    with watched.lock:
        figures = [PARTS[each["plot"]].make(scene) for each in plots]
    return {"content": figures_csv(figures), "filename": f"{scene.run.name.replace('/', '-')}.csv"}


def save_table(clicks: int, rows: list[Any] | None) -> dict[str, str]:
    return {"content": table_csv(rows or []), "filename": "runs.csv"}
