"""Fourth view: the table of all runs, and curves and settings of those that are picked in it."""

from collections.abc import Mapping, Sequence
from typing import Any

from dash import html

from dsv3.reporting import curves
from dsv3.reporting.dashboard.drawing import Drawn, Scene, View
from dsv3.reporting.dashboard.elements import part, plot, table
from dsv3.reporting.history import History
from dsv3.reporting.overlay import overlay
from dsv3.reporting.settings import differing, settings_of

MOST_SETTINGS = 40
"""Columns of settings in the table, and rows of them below it."""
MOST_DRAWN = 50
"""Picked runs that are drawn beside each other."""
FIGURES: dict[str, tuple[str, str]] = {
    "state": ("state", ""),
    "done": ("done", "d3.format('.0%')(params.value)"),
    "tokens": ("tokens", "d3.format('.3s')(params.value)"),
    "bpb": ("held-out bits per byte", "d3.format('.4f')(params.value)"),
    "max_violation": ("MaxVio", "d3.format('.2f')(params.value)"),
    "worst_layer": ("in layer", ""),
    "seconds_left": ("minutes left", "d3.format(',.0f')(params.value / 60)"),
    "parameters": ("parameters", "d3.format('.3s')(params.value)"),
    "active": ("active", "d3.format('.3s')(params.value)"),
    "why": ("why it failed", ""),
}
"""Columns of every run: heading, and how a number is written."""


def skeleton(run: str) -> list[Any]:
    return [
        plot("curves", run, 600),
        html.H2("Settings that differ"),
        part("settings", run),
        html.Div([plot("scores", run), plot("asked", run)], className="grid"),
    ]


def grid_rows(known: Sequence[Mapping[str, Any]], runs: Sequence[History]) -> list[dict[str, Any]]:
    """Rows of runs with the settings in which they differ."""
    rows = [dict(row) for row in known]
    for key, values in list(differing(runs).items())[:MOST_SETTINGS]:
        for row, value in zip(rows, values, strict=True):
            row[f"setting {key}"] = value
    return rows


def grid_columns(rows: Sequence[Mapping[str, Any]], sort: str) -> list[dict[str, Any]]:
    """Columns as AG Grid takes them; the filter of each suits its values."""
    by_name = {"function": "naturally"}
    columns: list[dict[str, Any]] = [
        {"field": "run", "headerName": "run", "pinned": "left", "filter": "agTextColumnFilter", "comparator": by_name}
    ]
    settings = dict.fromkeys(key for row in rows for key in row if key.startswith("setting "))
    for field in [*FIGURES, *settings]:
        heading, written = FIGURES.get(field, (field.removeprefix("setting "), ""))
        values = [row.get(field) for row in rows]
        is_number = all(
            isinstance(value, int | float) and not isinstance(value, bool) for value in values if value is not None
        )
        column: dict[str, Any] = {
            "field": field,
            "headerName": heading,
            "filter": f"ag{'Number' if is_number else 'Text'}ColumnFilter",
        }
        if is_number:
            column["type"] = "rightAligned"
        if written:
            column["valueFormatter"] = {"function": f"params.value == null ? '' : {written}"}
        columns.append(column)
    for column in columns:
        if column["field"] == sort.removeprefix("-"):
            column["sort"] = "desc" if sort.startswith("-") else "asc"
    return columns


def groups(scene: Scene) -> dict[str, list[History]]:
    """Runs by the value of the setting that they are grouped by; each by itself where there is none, the first of many
    alone."""
    if not scene.choice.group:
        return {run.name: [run] for run in scene.picked[:MOST_DRAWN]}
    grouped: dict[str, list[History]] = {}
    for run in scene.picked:
        value = settings_of(run).get(scene.choice.group)
        grouped.setdefault(f"{scene.choice.group}={value}", []).append(run)
    return {
        f"{name} (mean and range of {len(runs)})" if len(runs) > 1 else name: runs for name, runs in grouped.items()
    }


def picked_curves(scene: Scene) -> Any:
    choice, number = scene.choice, len(scene.picked)
    title = "Curves" if choice.group or number <= MOST_DRAWN else f"Curves of the first {MOST_DRAWN} of {number:,} runs"
    return overlay(groups(scene), choice.metrics, title=title, x=choice.x, smooth=choice.smooth, log=choice.log)


def settings(scene: Scene) -> Any:
    if len(scene.picked) < 2:
        return html.P("Select two or more runs to see in which settings they differ.")
    runs = scene.picked[:MOST_DRAWN]
    rows = list(differing(runs).items())
    content: list[Any] = [table(("setting", *(run.name for run in runs)), [[k, *v] for k, v in rows[:MOST_SETTINGS]])]
    if len(rows) > MOST_SETTINGS:
        content.append(html.P(f"and {len(rows) - MOST_SETTINGS} more"))
    return content if rows else html.P("They do not differ in any setting.")


VIEW = View(
    skeleton,
    {
        "curves": Drawn(picked_curves, ("picked", "metrics", "x", "smooth", "log", "group")),
        "settings": Drawn(settings, ("picked",)),
        "scores": Drawn(lambda scene: curves.benchmarks(scene.picked[:MOST_DRAWN]), ("picked",)),
        "asked": Drawn(lambda scene: curves.questions(scene.picked[:MOST_DRAWN]), ("picked",)),
    },
    lambda run: ("curves", "scores", "asked"),
)
