"""The choices of a reader as the elements of the page hold them."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dsv3.reporting.dashboard.address import Choice

HOLDERS = {
    **{name: (name, "value") for name in Choice._fields},
    "picked": ("grid", "selectedRows"),
    "pinned": ("pinned", "data"),
    "filters": ("grid", "filterModel"),
    "sort": ("grid", "columnState"),
}
"""Which property of which element holds a choice."""
OF_TABLE = ("filters", "sort")
"""Choices that the table gets with its columns: one without columns forgets them."""
CHOICES = [name for name in Choice._fields if name not in ("view", "run", *OF_TABLE)]
"""That the contents of a view depend on; for view and run the page gets a new skeleton."""


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


def chosen(values: Sequence[Any]) -> Choice:
    """From what the elements of `CHOICES` hold."""
    return choice_of(dict(zip(CHOICES, values, strict=True)))


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
