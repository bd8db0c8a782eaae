"""The report of a study as HTML, Markdown and a picture: verdicts first, then numbers, with seeds and intervals."""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go

from dsv3.run_folder import write_atomically
from dsv3.study.results import BUDGETS, Metric, Study, at_equal, common_budget, curve, headline, metrics
from dsv3.study.statistics import Difference, verdict
from dsv3.watch.page import page, shown, table
from dsv3.watch.palette import COLOURS
from dsv3.watch.style import X_AXES, framed, line

NOTE = (
    "Differences are paired by seed; intervals hold 95% (Student's t). Where an interval covers zero, no difference is "
    "shown. `detectable` is the smallest true difference that a study with this noise and as many seeds shows in four "
    "repetitions out of five. Comparisons are not corrected for their number."
)


class Section(NamedTuple):
    """A heading, sentences, and a table, in both forms of the report."""

    title: str
    sentences: list[str]
    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]


def sections(study: Study) -> Iterator[Section]:
    equal = [at_equal(study, budget) for budget in BUDGETS]
    yield Section("Verdict", verdicts(study, headline(study)), (), [])
    yield sizes(study)
    yield compared("At equal budgets", study, equal)
    yield compared("At the end of each run", study, list(metrics(study)))


def verdicts(study: Study, metric: Metric) -> list[str]:
    about = [f"Question: {study.question}"] if study.question else []
    about += [f"DeepSeek-V3's report: {study.finding}"] if study.finding else []
    if study.unfinished:
        about.append(f"Not finished, and left out: {', '.join(study.unfinished)}.")
    sentences = []
    for arm in study.runs:
        if arm != study.baseline and (difference := study.difference(metric, arm)):
            better = metric.lower_is_better
            sentences.append(verdict(arm, study.baseline, difference, unit=metric.unit, lower_is_better=better))
    return [*about, f"By {metric.name}:", *sentences] if sentences else [*about, "There is no second arm to compare."]


def sizes(study: Study) -> Section:
    """What each arm costs, so that an unfair comparison is seen."""
    headers = (
        "arm",
        "seeds",
        "parameters",
        "active per token",
        "in MTP",
        "operations per token",
        "cache bytes per token",
    )
    rows = []
    for arm, runs in study.runs.items():
        facts = next(iter(runs.values())).facts
        counts = facts.get("parameters", {})
        numbers = [counts.get(name) for name in ("total", "active", "mtp")]
        numbers += [facts.get("flops_per_token"), facts.get("cache_bytes_per_token")]
        rows.append((arm, ", ".join(map(str, sorted(runs))), *(round(n) if n is not None else "" for n in numbers)))
    return Section("Arms", [f"The others are compared with `{study.baseline}`."], headers, rows)


def compared(title: str, study: Study, of: Sequence[Metric]) -> Section:
    headers = ("metric", "unit", "arm", "mean", "difference", "95% interval", "shown", "detectable", "seeds")
    rows: list[Sequence[Any]] = []
    for metric in of:
        for arm in study.runs:
            values = study.values(metric, arm, study.seeds(arm))
            if values:
                difference = study.difference(metric, arm) if arm != study.baseline else None
                rows.append(
                    (metric.name, metric.unit, arm, f"{np.mean(values):.5g}", *difference_cells(difference, values))
                )
    return Section(title, [NOTE], headers, rows)


def difference_cells(difference: Difference | None, values: Sequence[float]) -> tuple[Any, ...]:
    if difference is None:
        return ("", "", "", "", len(values))
    if difference.seeds == 1:
        return (f"{difference.mean:+.4g}", "", "", "", 1)
    interval = f"{difference.low:+.4g} to {difference.high:+.4g}"
    answer = "yes" if difference.shown else "no difference shown"
    return (f"{difference.mean:+.4g}", interval, answer, difference.detectable, difference.seeds)


def band(study: Study, arm: str, budget: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points of a budget that all seeds of the arm reach, the mean there, and the standard deviation (0 for one)."""
    curves = [curve(run, budget) for run in study.runs[arm].values()]
    end = min(x[-1] for x, _ in curves)
    points = np.unique(np.concatenate([x[x <= end] for x, _ in curves]))
    values = np.stack([np.interp(points, x, y) for x, y in curves])
    return points, values.mean(0), values.std(0, ddof=1) if len(curves) > 1 else np.zeros(len(points))


def curves(study: Study, budget: str) -> go.Figure:
    """Held-out bits per byte of each arm: mean over its seeds, and a band of one standard deviation."""
    figure = go.Figure()
    for i, arm in enumerate(study.runs):
        x, middle, spread = band(study, arm, budget)
        edge = {"x": np.concatenate([x, x[::-1]]), "y": np.concatenate([middle + spread, (middle - spread)[::-1]])}
        fill = {"fill": "toself", "fillcolor": line(i)["color"], "opacity": 0.15, "line": {"width": 0}}
        figure.add_scatter(**edge, **fill, hoverinfo="skip", showlegend=False, mode="lines")
        figure.add_scatter(x=x, y=middle, mode="lines+markers", line=line(i), name=arm)
    return framed(figure, f"Held-out text over {budget}", x=X_AXES[budget], y="bits per byte", height=400)


def markdown(study: Study, *, picture: str | None) -> str:
    parts = [f"# {study.name}"]
    if picture:
        parts.append(
            f"![held-out bits per byte of each arm over tokens, with bands of one standard deviation]({picture})"
        )
    for section in sections(study):
        parts += [f"## {section.title}", "\n\n".join(section.sentences)]
        if section.rows:
            lines = [
                section.headers,
                ["-"] * len(section.headers),
                *([shown(cell) for cell in row] for row in section.rows),
            ]
            parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    return "\n\n".join(parts) + "\n"


def html(study: Study) -> str:
    parts: list[Any] = []
    for section in sections(study):
        text = "".join(f"<p>{escape(sentence)}</p>" for sentence in section.sentences)
        parts.append(f"<h2>{escape(section.title)}</h2>{text}")
        if section.rows:
            parts.append(table(section.headers, section.rows))
        if section.title == "Verdict":
            parts.append([curves(study, b) for b in BUDGETS if np.isfinite(common_budget(study, b))])
    return page(f"Study {study.name}", parts)


def draw(study: Study, out: Path) -> None:
    """The curves over tokens as a PNG, for a page that is not HTML."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    for i, arm in enumerate(study.runs):
        x, middle, spread = band(study, arm, "tokens")
        axis.plot(x / 1e6, middle, "o-", color=COLOURS[i % len(COLOURS)], markersize=4, label=arm)
        axis.fill_between(x / 1e6, middle - spread, middle + spread, color=COLOURS[i % len(COLOURS)], alpha=0.15)
    axis.set(title=study.name, xlabel="tokens trained on (millions)", ylabel="held-out text, bits per byte")
    axis.legend()
    write_atomically(out, lambda path: figure.savefig(path, format="png", dpi=100))
    plt.close(figure)


def write_study_report(study: Study, folder: Path) -> dict[str, str]:
    """Write report.html, report.md and report.png; returns their paths."""
    paths = {kind: folder / f"report.{kind}" for kind in ("png", "md", "html")}
    draw(study, paths["png"])
    for kind, text in (("md", markdown(study, picture=paths["png"].name)), ("html", html(study))):
        write_atomically(paths[kind], lambda path, text=text: path.write_text(text, encoding="utf-8"))
    return {kind: str(path) for kind, path in paths.items()}
