"""Section of a study's report."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go


class Section(NamedTuple):
    """A heading, sentences, a table and plots.

    sentences: Markdown, of which the pages know `code` and **bold** alone. figures: for the pages; Markdown and JSON
    leave them out.
    page: title of the page on which it stands; "": the first page.
    """

    title: str
    sentences: Sequence[str] = ()
    headers: Sequence[str] = ()
    rows: Sequence[Sequence[Any]] = ()
    figures: Sequence[go.Figure] = ()
    page: str = ""
