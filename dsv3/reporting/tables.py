"""Tables of HTML pages."""

from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

MOST_LETTERS = 24
"""Of a cell that stays on one line."""


def table(headers: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """An HTML table: columns of words to the left, of figures to the right. Cells of more than a few words may wrap."""
    rows = [[shown(value) for value in row] for row in rows]
    columns = [[row[i] for row in rows if row[i]] for i in range(len(headers))]
    of_words = [all(text[0].isalpha() for text in column) and bool(column) for column in columns]

    def cell(i: int, text: str) -> str:
        is_figure = text[:1].isdigit() or text.startswith(("+", "-"))
        kind = ' class="text"' if len(text) > MOST_LETTERS and not is_figure else ' class="word"' if of_words[i] else ""
        return f"<td{kind}>{escape(text)}</td>"

    head = "".join(f"<th{' class=word' * of_words[i]}>{escape(header)}</th>" for i, header in enumerate(headers))
    body = "".join(f"<tr>{''.join(cell(i, text) for i, text in enumerate(row))}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def shown(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return "" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
