"""Study report as HTML, Markdown and plots: verdicts first, then metrics with seeds and intervals."""

import math
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dsv3.checkpoint.run_folder import write_atomically
from dsv3.reporting.page import page, shown, table
from dsv3.reporting.paired import Difference, verdict
from dsv3.reporting.study_results import BUDGETS, Metric, Study, at_equal, common_budget, headline, metrics
from dsv3.study.figures import curves, domains, draw, draw_domains, first_runs, gaps

NOTE = (
    "Differences are paired by seed, with 95% confidence intervals (Student's t). A difference is significant if its "
    "interval excludes zero. The minimum detectable effect is the true difference that a study with this noise and as "
    "many seeds finds significant in 80% of its repetitions. Comparisons are not corrected for multiple testing."
)
SCHEDULES = (
    "At equal FLOPs or seconds, a run that used more is read before its end, during its learning-rate schedule, and "
    "interpolated linearly between two validations. A schedule that ended there would score better, so these rows "
    "overstate the loss of a more expensive arm."
)


class Section(NamedTuple):
    """A heading, sentences and a table of the report."""

    title: str
    sentences: list[str]
    headers: Sequence[str]
    rows: Sequence[Sequence[Any]]


def sections(study: Study) -> Iterator[Section]:
    equal = [at_equal(study, budget) for budget in BUDGETS]
    yield Section("Verdict", verdicts(study, headline(study)), (), [])
    yield Section("Runs", made_of(study), (), [])
    yield sizes(study)
    yield compared("At equal budgets", study, equal, [NOTE, SCHEDULES])
    yield compared("At the end of each run", study, list(metrics(study)), [NOTE])


def verdicts(study: Study, metric: Metric) -> list[str]:
    about = [f"Question: {study.question}"] if study.question else []
    about += [f"Published: {study.finding}"] if study.finding else []
    if study.baseline != study.planned_baseline:
        replaced = f"{study.planned_baseline}, the baseline, has no finished run"
        about.append(f"{replaced}: the others are compared with {study.baseline}.")
    if study.unfinished:
        about.append(f"Unfinished, not included: {', '.join(study.unfinished)}.")
    if study.failed:
        causes = "; ".join(f"{name} ({why.splitlines()[0]})" for name, why in study.failed.items())
        about.append(f"Failed, not included: {causes}.")
    sentences = [sentence for _, sentence in judged(study, metric)]
    if not sentences:
        return [*about, "There is no second arm to compare."]
    others = [
        f"{other.name}: {sentence}"
        for other in metrics(study)
        if other.name != metric.name
        for significant, sentence in judged(study, other)
        if significant
    ]
    besides = ["Other significant differences at the end of the runs:"] if others else []
    return [*about, f"By {metric.name}:", *sentences, *besides, *others]


def judged(study: Study, metric: Metric) -> Iterator[tuple[bool, str]]:
    """For each arm but the baseline: whether its difference is significant, and the verdict."""
    for _, arm in study.compared():
        if difference := study.difference(metric, arm):
            better = metric.lower_is_better
            sentence = verdict(arm, study.baseline, difference, unit=metric.unit, lower_is_better=better)
            yield difference.significant, sentence


def made_of(study: Study) -> list[str]:
    """What was run, and by which software."""
    summaries = [run.summary or {} for runs in study.runs.values() for run in runs.values()]
    tokens = " or ".join(f"{n:,} tokens ({steps:,} steps)" for n, steps in distinct(summaries, "tokens", "steps"))
    seeds = sorted({seed for runs in study.runs.values() for seed in runs})
    commits = [
        f"{commit[:12]}{'+' * commit.endswith('+')}" for (commit,) in distinct(summaries, "git_commit") if commit
    ]
    versions = [", ".join(f"{name} {v}" for name, v in made.items()) for (made,) in distinct(summaries, "versions")]
    return [
        f"`experiment={study.name}`: {len(summaries)} finished runs of {len(study.runs)} arms, with seeds "
        f"{', '.join(map(str, seeds))}, of {tokens} each.",
        f"Software: {'; or '.join(versions)}." + (f" Commit: {', or '.join(commits)}." if commits else ""),
    ]


def distinct(summaries: Sequence[dict[str, Any]], *keys: str) -> list[tuple[Any, ...]]:
    """The different values that the summaries have under the keys, in their order."""
    found: list[tuple[Any, ...]] = []
    for summary in summaries:
        values = tuple(summary.get(key) for key in keys)
        if values not in found:
            found.append(values)
    return found


def sizes(study: Study) -> Section:
    """Cost of each arm, to reveal unfair comparisons."""
    headers = (
        "arm",
        "seeds",
        "parameters",
        "active per token",
        "in MTP",
        "FLOPs per token",
        "KV-cache bytes per token",
    )
    rows = []
    for arm, runs in study.runs.items():
        info = next(iter(runs.values())).info
        counts = info.get("parameters", {})
        numbers = [counts.get(name) for name in ("total", "active", "mtp")]
        numbers += [info.get("flops_per_token"), info.get("cache_bytes_per_token")]
        rows.append((arm, ", ".join(map(str, sorted(runs))), *(round(n) if n is not None else "" for n in numbers)))
    return Section("Arms", [f"The others are compared with `{study.baseline}`."], headers, rows)


def compared(title: str, study: Study, of: Sequence[Metric], notes: list[str]) -> Section:
    head = ("metric", "unit", "arm", "mean", "difference", "95% interval", "significant")
    headers = (*head, "minimum detectable effect", "seeds")
    rows: list[Sequence[Any]] = []
    for metric in of:
        for arm in study.runs:
            values = study.values(metric, arm, study.seeds(arm))
            if values:
                difference = study.difference(metric, arm) if arm != study.baseline else None
                rows.append(
                    (metric.name, metric.unit, arm, f"{np.mean(values):.5g}", *difference_cells(difference, values))
                )
    return Section(title, notes, headers, rows)


def difference_cells(difference: Difference | None, values: Sequence[float]) -> tuple[Any, ...]:
    if difference is None:
        return ("", "", "", "", len(values))
    if difference.seeds == 1:
        return (f"{difference.mean:+.4g}", "", "", "", 1)
    interval = f"{difference.low:+.4g} to {difference.high:+.4g}"
    answer = "yes" if difference.significant else "no"
    detectable = "" if math.isnan(difference.detectable) else difference.detectable
    return (f"{difference.mean:+.4g}", interval, answer, detectable, difference.seeds)


def markdown(study: Study, content: Sequence[Section], pictures: dict[str, str]) -> str:
    """The report with the plots' file names, `png` and (where experts were watched) `domains`."""
    alternative = "held-out bits per byte of each arm over tokens, and differences from the baseline"
    parts = [f"# {study.name}", f"![{alternative}]({pictures['png']})"]
    for section in content:
        parts += [f"## {section.title}", "\n\n".join(section.sentences)]
        if section.rows:
            lines = [
                section.headers,
                ["-"] * len(section.headers),
                *([shown(cell) for cell in row] for row in section.rows),
            ]
            parts.append("\n".join(f"| {' | '.join(cells)} |" for cells in lines))
    if "domains" in pictures:
        parts += ["## Experts by domain", f"![load of each expert on each domain, by arm]({pictures['domains']})"]
    return "\n\n".join(parts) + "\n"


def marked_up(sentence: str) -> str:
    """A sentence of Markdown as HTML: what stands between backquotes is code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(sentence))


def html(study: Study, content: Sequence[Section]) -> str:
    parts: list[Any] = []
    for section in content:
        text = "".join(f"<p>{marked_up(sentence)}</p>" for sentence in section.sentences)
        parts.append(f"<h2>{escape(section.title)}</h2>{text}")
        if section.rows:
            parts.append(table(section.headers, section.rows))
        if section.title == "Verdict":
            known = [budget for budget in BUDGETS if np.isfinite(common_budget(study, budget))]
            parts.append([curves(study, budget) for budget in known])
            if study.compared():
                parts.append([gaps(study, budget) for budget in known])
    if pictures := domains(study):
        parts += ["<h2>Experts by domain</h2>", pictures]
    return page(f"Study {study.name}", parts)


def write_study_report(study: Study, content: Sequence[Section], folder: Path) -> dict[str, str]:
    """Write report.html, report.md and their plots; returns the paths. `content`: the study's `sections`."""
    paths = {kind: folder / f"report.{kind}" for kind in ("png", "md", "html")}
    draw(study, paths["png"])
    if first_runs(study):
        paths["domains"] = folder / "report_domains.png"
        draw_domains(study, paths["domains"])
    names = {kind: path.name for kind, path in paths.items()}
    for kind, text in (("md", markdown(study, content, names)), ("html", html(study, content))):
        write_atomically(paths[kind], lambda path, text=text: path.write_text(text, encoding="utf-8"))
    return {kind: str(path) for kind, path in paths.items()}
