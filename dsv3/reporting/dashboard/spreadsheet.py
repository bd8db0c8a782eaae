"""Contents of a view as CSV."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""Beginnings of what a spreadsheet would compute: names of run folders and settings may come from strangers."""


def plain(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def csv_text(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    written = io.StringIO()
    writer = csv.writer(written, lineterminator="\n")
    writer.writerow(map(plain, headers))
    writer.writerows([plain(value) for value in row] for row in rows)
    return written.getvalue()


def table_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the table, in its order."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    headers = [column.removeprefix("setting ") for column in columns]
    return csv_text(headers, ([row.get(column) for column in columns] for row in rows))


def figures_csv(figures: Iterable[go.Figure]) -> str:
    """A line for each point of each curve, and for each cell of each map."""
    return csv_text(("plot", "curve", "x", "y", "value"), (row for figure in figures for row in points(figure)))


def points(figure: go.Figure) -> Iterable[tuple[Any, ...]]:
    title = figure.layout.title.text or ""
    for trace in figure.data:
        if trace.type == "heatmap":
            x = trace.x if trace.x is not None else range(len(trace.z[0]) if len(trace.z) else 0)
            y = trace.y if trace.y is not None else range(len(trace.z))
            for name, row in zip(y, trace.z, strict=True):
                yield from ((title, "", at, name, value) for at, value in zip(x, row, strict=True))
        else:
            yield from ((title, trace.name or "", x, y, "") for x, y in zip(trace.x, trace.y, strict=True))
