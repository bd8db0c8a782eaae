"""Everything that the page is asked to show, which is all in its address."""

import json
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlencode

from dsv3.reporting.overlay import HELD_OUT, X_AXES

VIEWS = ("health", "training", "experts", "runs", "study")


class Choice(NamedTuple):
    """What the controls say; each field is named like its control, and like its key in the address."""

    view: str = "health"
    run: str = ""  # "": the one that began last
    layer: str = ""  # "": the worst
    domain: str = ""  # "": all tokens
    moment: int = 0  # intervals after the last one: 0, or below
    picked: tuple[str, ...] = ()  # runs selected in the table
    pinned: tuple[str, ...] = ()  # runs that stay at its top
    metrics: tuple[str, ...] = ("loss", HELD_OUT)
    x: str = "tokens"
    smooth: float = 0.9
    log: tuple[str, ...] = ()
    group: str = ""  # key of a setting
    filters: str = "{}"  # the table's filters, JSON
    sort: str = ""  # a column, `-` before it: falling


MOST_LETTERS = 60_000
"""Of an address: servers and browsers take no more."""


def to_search(choice: Choice) -> str:
    """The query of an address: what differs from the defaults; without picked runs where these are too many."""
    if sum(map(len, choice.picked)) > MOST_LETTERS // 4:  # `&picked=` and escapes come on top
        choice = choice._replace(picked=())
    differs = {name: value for name, value in choice._asdict().items() if value != Choice._field_defaults[name]}
    return "?" + urlencode(differs, doseq=True) if differs else ""


def from_search(search: str) -> Choice:
    """What is unknown or cannot be is left at its default: anyone may write an address."""
    given = parse_qs(search.removeprefix("?")) if len(search) < MOST_LETTERS else {}
    values: dict[str, Any] = {}
    for name, default in Choice._field_defaults.items():
        if name in given:
            values[name] = tuple(given[name]) if isinstance(default, tuple) else given[name][-1]
    choice = Choice(**values)
    return choice._replace(
        view=choice.view if choice.view in VIEWS else "health",
        x=choice.x if choice.x in X_AXES else "tokens",
        moment=int(number(choice.moment, -(10**9), 0, 0)),
        smooth=number(choice.smooth, 0, 0.99, Choice().smooth),
        log=tuple(axis for axis in ("x", "y") if axis in choice.log),
        filters=choice.filters if is_object(choice.filters) else "{}",
    )


def number(value: Any, least: float, most: float, default: float) -> float:
    """The default where it is no number in the range."""
    try:
        return float(value) if least <= float(value) <= most else default
    except ValueError:
        return default


def is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False
