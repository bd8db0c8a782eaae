"""Contents of the views, drawn where and when they are seen."""

from collections.abc import Iterator, Mapping
from typing import Any

from dash import dcc, html, no_update
from dash.exceptions import PreventUpdate

from dsv3.reporting.dashboard import experts_view, health_view, runs_view, study_view, training_view
from dsv3.reporting.dashboard.drawing import View, redrawn, scene_of, text_of
from dsv3.reporting.dashboard.elements import graph, height_of, zoomed
from dsv3.reporting.dashboard.held_choices import chosen
from dsv3.reporting.dashboard.spreadsheet import figures_csv
from dsv3.reporting.dashboard.watched import Watched

VIEWS: dict[str, View] = {
    "health": health_view.VIEW,
    "training": training_view.VIEW,
    "experts": experts_view.VIEW,
    "runs": runs_view.VIEW,
    "study": study_view.VIEW,
}
PARTS = {name: part for view in VIEWS.values() for name, part in view.drawn.items()}


def skeleton(
    watched: Watched,
    view: str | None,
    run: str | None,
    there: list[Any],
    shown: str,
    seen: Mapping[str, Any],
    *values: Any,
) -> tuple[Any, str]:
    """The elements of a view. Those that are there are left as they are: plots keep their zoom.

    The plots that the screen shows come with them; where it shows the top of the view, or showed another view, those
    that a large screen begins with. Whatever else there is, `draw` draws."""
    if view is None or (there == [{"drawn": run}] and shown == f"view-{view}"):
        raise PreventUpdate
    if not run:
        return html.P("There are no runs in this folder yet."), f"view-{view}"
    content = html.Div(VIEWS[view].skeleton(run))
    places = dict(places_in(content))
    known: dict[str, str] = {}
    if (scene := scene_of(watched, run, chosen(values))) is not None:
        with watched.lock:
            first, still = VIEWS[view].first(scene.run), seen["names"] if shown == f"view-{view}" else ()
        names = first if not still or first[0] in still else still
        made, known = redrawn(watched, scene, PARTS, [name for name in names if name in places], {})
        for name, figure in made.items():
            places[name].children = graph(name, run, figure)
    return [dcc.Store(id={"drawn": run}, data=known), *content.children], f"view-{view}"


def places_in(content: html.Div) -> Iterator[tuple[str, Any]]:
    """Name and element of each place that a plot is drawn in."""
    for element in content._traverse():
        if "place" in (getattr(element, "id", None) or ()):
            yield element.id["place"], element


def draw(
    watched: Watched,
    changed: Any,
    seen: Mapping[str, Any],
    places: list[Any],
    parts: list[Any],
    drawn: list[Any],
    plots: list[Any],
    moves: Mapping[str, Any],
    *values: Any,
) -> list[list[Any]]:
    """All parts of the view, and its plots on the screen, that are not up to date. A plot that shows the same gets
    another figure, in the ranges that its axes were moved to; one that shows something else is a new plot."""
    ids = [*places, *parts]
    scene = scene_of(watched, ids[0]["run"], chosen(values)) if ids else None
    if scene is None:
        raise PreventUpdate
    names = [each["place"] for each in places if each["place"] in seen["names"]] + [each["part"] for each in parts]
    known = drawn[0] or {}
    made, now = redrawn(watched, scene, PARTS, names, known)
    if not made:
        raise PreventUpdate
    run, there = scene.run.name, {each["plot"] for each in plots}
    same = {name for name in there & made.keys() if what(known.get(name, "")) == what(now[name])}
    ranges = {name: move["axes"] for name, move in moves.items() if name in same and move["of"] == what(now[name])}
    new = [
        graph(name, run, made[name]) if name in made and name not in same else no_update
        for name in (each["place"] for each in places)
    ]
    figures = [
        zoomed(made[each["plot"]], ranges.get(each["plot"], {})) if each["plot"] in same else no_update
        for each in plots
    ]
    styles = [no_update if figure is no_update else height_of(figure) for figure in figures]
    texts = [text_of(made[each["part"]]) if each["part"] in made else no_update for each in parts]
    watched.ahead.asked(watched.look(), run)
    return [new, figures, styles, texts, [{**known, **now}]]


def what(key: str) -> str:
    """Of a part's key: what the part shows."""
    return key.partition(" ")[0]


def save_view(watched: Watched, clicks: int, places: list[Any], *values: Any) -> dict[str, str]:
    """The figures of the plots that are shown."""
    scene = scene_of(watched, places[0]["run"], chosen(values)) if places else None
    if scene is None:
        raise PreventUpdate
    with watched.lock:
        figures = [PARTS[each["place"]].make(scene) for each in places]
    return {"content": figures_csv(figures), "filename": f"{scene.run.name.replace('/', '-')}.csv"}
