"""Sections of every study's report: what each arm is, the verdict, the figures, and pages of their details."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from dsv3.reporting.paired import Difference
from dsv3.reporting.settings import differing
from dsv3.reporting.study_figures import curves, domains, gaps, with_the_same_text
from dsv3.reporting.study_results import BUDGETS, Metric, Study, at_equal, common_budget, headline, metrics
from dsv3.reporting.study_verdict import answered, direction
from dsv3.study.section import Section

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
IN_CELLS = (
    "Mean over seeds; in parentheses the difference from the baseline and half the width of its 95% interval. "
    "`better`, `worse`, `higher` and `lower` are said of significant differences only. Held-out text and "
    "specialisation are compared where runs hold out the same kind of data and the same domains, training losses where "
    "they have one objective."
)
FIGURES, EXPERTS, RUNS = "All figures", "Experts", "Runs"
"""Pages after the first."""


def arms(study: Study) -> Iterator[Section]:
    """What differs between the arms, and what each costs, to reveal unfair comparisons."""
    headers = ("arm", "what differs", "seeds", "parameters", "active per token", "in MTP", "FLOPs per token")
    rows = []
    for arm, runs in study.runs.items():
        info = next(iter(runs.values())).info
        counts = info.get("parameters", {})
        numbers = [counts.get(name) for name in ("total", "active", "mtp")]
        numbers += [info.get("flops_per_token"), info.get("cache_bytes_per_token")]
        seeds = ", ".join(map(str, sorted(runs)))
        costs = (round(n) if n is not None else "" for n in numbers)
        rows.append((arm, study.overrides.get(arm, ""), seeds, *costs))
    sentence = f"The others are compared with `{study.baseline}`."
    yield Section("Arms", [sentence], (*headers, "KV-cache bytes per token"), rows)


def verdict(study: Study) -> Iterator[Section]:
    """One sentence for the question of the study."""
    answer, _ = answered(study, headline(study))
    said = [f"Question: {study.question}"] if study.question else []
    said += [f"**{answer or 'There is no second arm to compare.'}**"]
    said += [f"Published: {study.finding}"] if study.finding else []
    yield Section("Verdict", [*said, *left_out(study)])


def left_out(study: Study) -> Iterator[str]:
    """What the verdict does not rest on."""
    if study.baseline != study.planned_baseline:
        replaced = f"{study.planned_baseline}, the baseline, has no finished run"
        yield f"{replaced}: the others are compared with {study.baseline}."
    if study.unfinished:
        yield f"Unfinished, not included: {', '.join(study.unfinished)}."
    if study.failed:
        causes = "; ".join(f"{name} ({why.splitlines()[0]})" for name, why in study.failed.items())
        yield f"Failed, not included: {causes}."
    if study.repeated:
        yield f"Repetitions of other runs, not included: {', '.join(study.repeated)}."


def results(study: Study) -> Iterator[Section]:
    """Every figure of every arm, and its plots."""
    rows = []
    for metric in [*of_budgets(study, telling(study)), *metrics(study)]:
        cells = [result(study, metric, arm) for arm in study.runs]
        if any(cells):
            rows.append((f"{metric.name} ({metric.unit})", *cells))
    yield Section("Results", [IN_CELLS], ("figure", *study.runs), rows)


def result(study: Study, metric: Metric, arm: str) -> str:
    values = study.values(metric, arm, study.seeds(arm))
    if not values:
        return ""
    text = f"{np.mean(values):#.5g}".removesuffix(".")
    difference = study.difference(metric, arm) if arm != study.baseline else None
    if difference is None:
        return text
    word = f", {direction(metric, difference)}" if difference.significant else ""
    return f"{text} ({with_error(difference)}{word})"


def with_error(difference: Difference) -> str:
    """The difference and half the width of its interval, both to the second digit of the latter."""
    half = difference.high - difference.mean
    if difference.seeds == 1 or not half > 0 or not math.isfinite(half):
        return f"{difference.mean:+.3g}"
    digits = max(0, 1 - math.floor(math.log10(half)))
    return f"{difference.mean:+,.{digits}f} ± {half:,.{digits}f}"


def plots(study: Study) -> Iterator[Section]:
    if len(study.runs) > 1 and not with_the_same_text(study, study.compared()):
        return
    known = [budget for budget in telling(study) if np.isfinite(common_budget(study, budget))]
    figures = [plot for budget in known for plot in (curves(study, budget), gaps(study, budget))]
    yield Section("Held-out text", figures=figures)


def telling(study: Study) -> list[str]:
    """Budgets, FLOPs left out where each token takes as many in every arm: then they say what tokens say."""
    per_token = {run.info.get("flops_per_token") for runs in study.runs.values() for run in runs.values()}
    return [budget for budget in BUDGETS if budget != "flops" or len(per_token) > 1]


def details(study: Study) -> Iterator[Section]:
    """One sentence for each other figure in which arms differ, and every difference with its interval and its minimum
    detectable effect."""
    asked = headline(study).name
    others = [answered(study, metric) for metric in metrics(study) if metric.name != asked]
    if clear := [sentence for sentence, is_clear in others if is_clear]:
        yield Section("Other significant differences at the end of the runs", clear, page=FIGURES)
    yield compared("At equal budgets", study, of_budgets(study, BUDGETS), [NOTE, SCHEDULES])
    yield compared("At the end of each run", study, list(metrics(study)), [NOTE])


def of_budgets(study: Study, budgets: Sequence[str]) -> list[Metric]:
    return [at_equal(study, budget) for budget in budgets]


def compared(title: str, study: Study, of: Sequence[Metric], notes: Sequence[str]) -> Section:
    head = ("metric", "unit", "arm", "mean", "difference", "95% interval", "significant")
    headers = (*head, "minimum detectable effect", "seeds")
    rows: list[Sequence[Any]] = []
    for metric in of:
        for arm in study.runs:
            values = study.values(metric, arm, study.seeds(arm))
            if values:
                difference = study.difference(metric, arm) if arm != study.baseline else None
                mean = f"{np.mean(values):.5g}"
                rows.append((metric.name, metric.unit, arm, mean, *difference_cells(difference, values)))
    return Section(title, notes, headers, rows, page=FIGURES)


def difference_cells(difference: Difference | None, values: Sequence[float]) -> tuple[Any, ...]:
    if difference is None:
        return ("", "", "", "", len(values))
    if difference.seeds == 1:
        return (f"{difference.mean:+.4g}", "", "", "", 1)
    interval = f"{difference.low:+.4g} to {difference.high:+.4g}"
    answer = "yes" if difference.significant else "no"
    detectable = "" if math.isnan(difference.detectable) else difference.detectable
    return (f"{difference.mean:+.4g}", interval, answer, detectable, difference.seeds)


def runs(study: Study) -> Iterator[Section]:
    """What was run, by which software, and in which settings the runs differ."""
    histories = [run for runs in study.runs.values() for run in runs.values()]
    summaries = [run.summary or {} for run in histories]
    tokens = " or ".join(f"{n:,} tokens ({steps:,} steps)" for n, steps in distinct(summaries, "tokens", "steps"))
    seeds = sorted({seed for runs in study.runs.values() for seed in runs})
    commits = [
        f"{commit[:12]}{'+' * commit.endswith('+')}" for (commit,) in distinct(summaries, "git_commit") if commit
    ]
    versions = [", ".join(f"{name} {v}" for name, v in made.items()) for (made,) in distinct(summaries, "versions")]
    made_of = (
        f"{study.command}: {len(summaries)} finished runs of {len(study.runs)} arms, with seeds "
        f"{', '.join(map(str, seeds))}, of {tokens} each."
    )
    software = f"Software: {'; or '.join(versions)}." + (f" Commit: {', or '.join(commits)}." if commits else "")
    yield Section("Runs", [made_of, software])
    of_runs = list(metrics(study))
    rows = [(run.name, *(rounded(metric.of(run)) for metric in of_runs)) for run in histories]
    yield Section("Every run", [], ("run", *(metric.name for metric in of_runs)), rows, page=RUNS)
    settings = [(key, *values) for key, values in differing(histories).items()]
    yield Section("Settings that differ", [], ("setting", *(run.name for run in histories)), settings, page=RUNS)


def rounded(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"


def distinct(summaries: Sequence[dict[str, Any]], *keys: str) -> list[tuple[Any, ...]]:
    """The different values that the summaries have under the keys, in their order."""
    found: list[tuple[Any, ...]] = []
    for summary in summaries:
        values = tuple(summary.get(key) for key in keys)
        if values not in found:
            found.append(values)
    return found


def experts(study: Study) -> Iterator[Section]:
    """Load of the experts by domain, by arm."""
    if figures := domains(study):
        yield Section("Experts by domain", figures=figures, page=EXPERTS)
