"""Formulas of pages as MathML, which browsers draw by themselves: no script and no font is loaded."""

import html
import re
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)
"""Written by pymdownx.arithmatex with generic: true."""


def on_page_content(content: str, **_: Any) -> str:
    """mkdocs calls this with the HTML of each page."""
    return FORMULA.sub(mathml, content)


def mathml(found: re.Match[str]) -> str:
    shown = convert(html.unescape(found[3]), display="block" if found[2] == "[" else "inline")
    return f'<div class="formula">{shown}</div>' if found[2] == "[" else shown
