"""Building blocks of the page: tables, plots, labelled controls."""

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from dash import dcc, html

from dsv3.reporting.page import shown
from dsv3.reporting.style import NO_UPLOAD

SAVED: Any = NO_UPLOAD | {"toImageButtonOptions": {"format": "png", "scale": 2}}


def control(label: str, element: Any, views: str = "") -> html.Div:
    """A labelled control, shown in these views only (their names with spaces; empty: in all)."""
    shown_in = [f"only only-{view}" for view in views.split()]
    return html.Div([html.Label(label, htmlFor=element.id), element], className=" ".join(["control", *shown_in]))


def plot(name: str, run: str, height: int = 300) -> html.Div:
    """The place of a plot, which is drawn once it is on the screen; so high until then."""
    return html.Div(id={"place": name, "run": run}, className="card place", style={"--height": f"{height}px"})


def graph(name: str, run: str, figure: go.Figure) -> dcc.Graph:
    """A plot in its place."""
    return dcc.Graph(
        id={"plot": name, "run": run}, figure=figure, responsive=True, config=SAVED, style=height_of(figure)
    )


def zoomed(figure: go.Figure, ranges: Mapping[str, Any]) -> go.Figure:
    """In the ranges that its reader has moved its axes to."""
    for axis, ends in ranges.items():
        if None not in ends:
            figure.update_layout({axis: {"range": ends}})
    return figure


def height_of(figure: go.Figure) -> dict[str, str]:
    return {"height": f"{figure.layout.height}px"}


def part(name: str, run: str, kind: str = "") -> html.Div:
    """The place of a table or text that is written later."""
    return html.Div(id={"part": name, "run": run}, className=kind)


def table(headers: Sequence[str], rows: Sequence[Sequence[Any]], chosen: int | None = None) -> html.Div:
    """A table; the row with number `chosen` is marked."""

    def cell(value: Any) -> html.Td:
        if not isinstance(value, str | int | float | None):
            return html.Td(value)
        text = shown(value)
        return html.Td(text, className="text" if len(text) > 24 else None)

    def row(i: int, values: Sequence[Any]) -> html.Tr:
        return html.Tr([cell(value) for value in values], className="chosen" if i == chosen else None)

    head = html.Thead(html.Tr([html.Th(header, scope="col") for header in headers]))
    return html.Div(html.Table([head, html.Tbody([row(i, r) for i, r in enumerate(rows)])]), className="scroll")


def badge(text: str, kind: str) -> html.Span:
    """A word in a colour: good, bad, warn or plain."""
    return html.Span(text, className=f"badge {kind}")
