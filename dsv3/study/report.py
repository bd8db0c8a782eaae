"""Report of a study: HTML pages that share one plotly.js, the same as Markdown, and plots as PNG.

The first page says what each arm is, then the verdict, then the figures, then plots; details are on further pages.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from pathlib import Path

from dsv3.checkpoint.run_folder import write_text_atomically
from dsv3.reporting.page import grid, page
from dsv3.reporting.study_figures import draw, draw_domains, first_runs
from dsv3.reporting.study_results import Study
from dsv3.reporting.tables import shown, table
from dsv3.study import contents, evidence
from dsv3.study.section import Section

SECTIONS: tuple[Callable[[Study], Iterable[Section]], ...] = (
    contents.arms,
    evidence.matching,
    contents.verdict,
    evidence.tuning,
    contents.results,
    contents.plots,
    evidence.errors,
    evidence.power,
    contents.runs,
    contents.details,
    contents.experts,
)
"""What a report holds, in its order. A section of one's own is a function in a file of its own, and its place here."""

MOST_BYTES = 1_000_000
"""Of a page: what does not fit goes to another."""
PLOTLY = "report_plotly.js"


def sections(study: Study) -> Iterator[Section]:
    for make in SECTIONS:
        yield from make(study)


def markdown(study: Study, content: Sequence[Section], pictures: dict[str, str]) -> str:
    """The report with the plots' file names, `png` and (where experts were watched) `domains`."""
    parts = [f"# {inert(study.name)}"]
    for section in (s for s in content if s.sentences or s.rows or s.title in ALTERNATIVES):
        parts += [f"## {section.title}", "\n\n".join(map(inert, section.sentences))]
        if section.rows:
            rows = [[inert(shown(cell)) for cell in row] for row in section.rows]
            lines = [[inert(header) for header in section.headers], ["-"] * len(section.headers), *rows]
            parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
        if section.figures and section.title in ALTERNATIVES:
            name, alternative = ALTERNATIVES[section.title]
            parts.append(f"![{alternative}]({pictures[name]})")
    return "\n\n".join(filter(None, parts)) + "\n"


ALTERNATIVES = {
    "Held-out text": ("png", "held-out bits per byte of each arm over tokens, and differences from the baseline"),
    "Experts by domain": ("domains", "load of each expert on each domain, by arm"),
}
"""Section -> the PNG that stands for its plots, and what it shows."""


def inert(text: str) -> str:
    """Text from a run folder as Markdown that shows it: no markup, no link, no second cell or line."""
    text = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\[\]|])", r"\\\1", text)


def marked_up(sentence: str) -> str:
    """A sentence of Markdown as HTML: what stands between backquotes is code, between two stars bold."""
    code = re.sub("`([^`]+)`", r"<code>\1</code>", escape(sentence))
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", code)


def pages(study: Study, content: Sequence[Section]) -> dict[str, str]:
    """File name -> HTML, the first page first."""
    titles = dict.fromkeys(section.page for section in content)
    filled = {
        (title, number): parts
        for title in titles
        for number, parts in enumerate(packed([s for s in content if s.page == title]), 1)
    }
    names = {key: file_name(*key) for key in filled}
    found = {}
    for key, parts in filled.items():
        links = [
            f"<b>{label}</b>" if key == other else f'<a href="{names[other]}">{label}</a>'
            for other in filled
            for label in [escape(label_of(*other))]
        ]
        title = f"Study {study.name}" + (f": {label_of(*key)}" if key[0] else "")
        found[names[key]] = page(title, [f"<nav>{' '.join(links)}</nav>", *parts], plotly=PLOTLY)
    return found


def label_of(title: str, number: int) -> str:
    return (title or "Report") + (f", {number}" if number > 1 else "")


def file_name(title: str, number: int) -> str:
    words = ["report", *re.findall(r"[a-z0-9]+", title.lower()), *([str(number)] if number > 1 else [])]
    return f"{'_'.join(words)}.html"


def packed(of_page: Sequence[Section]) -> Iterator[list[str]]:
    """Contents of pages of at most `MOST_BYTES`, as far as one plot or table does not take more."""
    parts: list[str] = []
    for part in (part for section in of_page for part in html_of(section)):
        if parts and sum(map(len, parts)) + len(part) > 0.95 * MOST_BYTES:  # the rest is the page's frame
            yield parts
            parts = []
        parts.append(part)
    if parts:
        yield parts


def html_of(section: Section) -> Iterator[str]:
    text = "".join(f"<p>{marked_up(sentence)}</p>" for sentence in section.sentences)
    body = [table(section.headers, section.rows)] if section.rows else []
    figures = section.figures
    pairs = (figures[i : i + 2] for i in range(0, len(figures), 2))
    first, *others = [*body, *(grid(pair) for pair in pairs)] or [""]
    yield f"<h2>{escape(section.title)}</h2>{text}{first}"
    yield from others


def write_study_report(study: Study, content: Sequence[Section], folder: Path) -> dict[str, str]:
    """Write the pages (`html`: the first), report.md and their plots; returns the paths. `content`: the `sections`."""
    from plotly.offline import get_plotlyjs

    paths = {kind: folder / f"report.{kind}" for kind in ("md", "html")}
    if any(section.title == "Held-out text" for section in content):
        paths["png"] = folder / "report.png"
        draw(study, paths["png"])
    if first_runs(study):
        paths["domains"] = folder / "report_domains.png"
        draw_domains(study, paths["domains"])
    names = {kind: path.name for kind, path in paths.items()}
    texts = {PLOTLY: get_plotlyjs(), **pages(study, content), paths["md"].name: markdown(study, content, names)}
    for name, text in texts.items():
        write_text_atomically(folder / name, text)
    return {kind: str(path) for kind, path in paths.items()}
