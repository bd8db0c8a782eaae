"""Tables of HTML pages."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """An HTML table. Text cells longer than a few words may wrap."""

    def cell(value: Any) -> str:
        text = shown(value)
        return f'<td class="text">{escape(text)}</td>' if len(text) > 24 else f"<td>{escape(text)}</td>"

    head = "".join(f"<th>{escape(header)}</th>" for header in headers)
    body = "".join(f"<tr>{''.join(map(cell, row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
