"""Sections of a study's report on what its verdict rests on: matched sizes, errors, power, tuning."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import plotly.graph_objects as go
from scipy.special import stdtrit

from dsv3.config.study_metrics import Figure
from dsv3.reporting.paired import Difference, adjusted, detectable
from dsv3.reporting.study_results import Metric, Study, at_equal, headline, metrics
from dsv3.reporting.study_verdict import answered
from dsv3.reporting.style import framed, line
from dsv3.study.matching import read_matching
from dsv3.study.section import Section
from dsv3.study.tuning import Values, read_tuning, tuned_study

SEEDS = (3, 4, 6, 8, 12, 16, 24, 32)
"""Of the power curve."""
ERRORS = (
    "Half the width of the 95% interval is the root of the squares of two: by seeds (Student's t), and by held-out "
    "documents (bootstrap over documents within each domain, the same ones for all seeds), which more seeds do not "
    "make narrower; empty where runs did not record their documents. `p, Holm` is corrected for the number of arms; "
    "the intervals are not."
)
RULE = (
    "Seeds were added by a sequential rule: after each seed from the fourth on, an arm is settled where its interval "
    "for repeated looks excludes zero or is as narrow as was asked for (±{half_width:g}), with {most_seeds} seeds at "
    "most. Intervals and p values take the repeated looks into account; seeds after the one that settled an arm do not "
    "count."
)
CURVE = (
    "With the noise of this study, a study of so many seeds would have this half width, and would find a true "
    "difference of the second figure significant in 80% of its repetitions."
)
DOCUMENTS = "Documents alone give ±{documents:.4f}: for less, set a larger data.validation_tokens."


def matching(study: Study) -> Iterator[Section]:
    found = read_matching(study.folder)
    if found is None:
        return
    rows = []
    for arm in found.arms:
        error = arm.error(found.target)
        reached = "baseline" if arm.value is None else "yes" if abs(error) <= found.tolerance else "no"
        rows.append((arm.arm, "" if arm.value is None else arm.value, arm.reached, f"{error:+.2%}", reached))
    sentence = f"`{found.by}` of each arm was solved for equal {found.quantity}, within {found.tolerance:.2%}."
    yield Section("Matching", [sentence], ("arm", found.by, found.quantity, "error", "matched"), rows)


def differences(study: Study, metric: Metric) -> dict[str, Difference]:
    found = {arm: study.difference(metric, arm) for _, arm in study.compared()}
    return {arm: difference for arm, difference in found.items() if difference is not None}


def errors(study: Study) -> Iterator[Section]:
    """Where the verdict's intervals come from."""
    metric = headline(study)
    found = differences(study, metric)
    if not any(difference.seeds > 1 for difference in found.values()):
        return
    sentences = [ERRORS, *([RULE.format(**study.until)] if study.until else []), *smoothing(study, metric)]
    holm = adjusted([difference.p_value for difference in found.values()])
    rows = [
        (
            arm,
            d.seeds,
            f"{d.mean:+.4f}",
            half(d),
            by_seeds(d),
            d.documents or None,
            *map(p_text, (d.p_value, p)),
            d.settled,
        )
        for (arm, d), p in zip(found.items(), holm, strict=True)
    ]
    head = ("arm", "seeds", "difference", "half width", "by seeds", "by documents", "p", "p, Holm")
    yield Section("Errors", sentences, (*head, "settled"), rows)


def half(difference: Difference) -> float | None:
    return difference.high - difference.mean if difference.seeds > 1 else None


def by_seeds(difference: Difference) -> float | None:
    width = half(difference)
    return None if width is None else math.sqrt(max(0.0, width**2 - difference.documents**2))


def p_text(p_value: float) -> str:
    return "" if math.isnan(p_value) else f"{p_value:.3f}"


def smoothing(study: Study, metric: Metric) -> Iterator[str]:
    """Whether EMA weights would narrow the intervals, and by how much they would move the differences."""
    if metric.name != at_equal(study, "tokens").name:
        return
    smoothed = next((other for other in metrics(study) if other.name == Figure.EMA), None)
    fixed = study._replace(until=None)
    for arm, live in differences(fixed, metric).items():
        ema = fixed.difference(smoothed, arm) if smoothed else None
        if ema is not None and live.seeds > 1 and live.error > 0:
            yield (
                f"{arm}: EMA weights make the error over seeds {ema.error / live.error:.2f} times as large and move "
                f"the difference by {ema.mean - live.mean:+.4f}."
            )


def power(study: Study) -> Iterator[Section]:
    """What this study could have shown, and what more seeds would."""
    noisy = {arm: d for arm, d in differences(study, headline(study)).items() if d.seeds > 1 and d.error > 0}
    if not noisy:
        return
    figure, rows = go.Figure(), []
    for number, (arm, d) in enumerate(noisy.items()):
        of_seeds = [curve_point(d, n) for n in SEEDS]
        figure.add_scatter(
            x=SEEDS, y=[effect for _, effect in of_seeds], mode="lines+markers", line=line(number), name=arm
        )
        rows.append((arm, *(f"±{width:.4f}, {effect:.4f}" for width, effect in of_seeds)))
    worst = max(noisy, key=lambda arm: noisy[arm].error * math.sqrt(noisy[arm].seeds))
    sentences = [CURVE]
    if documents := noisy[worst].documents:
        sentences.append(DOCUMENTS.format(documents=documents))
    plot = framed(figure, "Minimum detectable effect", x="seeds", y="bits per byte or the metric's unit", height=350)
    headers = ("arm", *(f"{n} seeds" for n in SEEDS))
    yield Section("Power", sentences, headers, rows, [plot])


def curve_point(difference: Difference, n: int) -> tuple[float, float]:
    """Half width and minimum detectable effect of a study of n seeds with the noise of this one."""
    error = difference.error * math.sqrt(difference.seeds / n)
    quantile = float(stdtrit(n - 1, 0.975))
    return math.hypot(quantile * error, difference.documents), detectable(quantile, error, n, difference.documents)


def tuning(study: Study) -> Iterator[Section]:
    """Each arm's best values, what they cost, and the verdict with them."""
    tuned = read_tuning(study.folder)
    if not tuned:
        return
    spent = sum(arm.tokens for arm in tuned)
    runs = sum(len(arm.trials) for arm in tuned)
    sentences = [
        f"Each arm was tuned by successive halving: {runs} short runs of {spent:,} tokens together, with seeds that no "
        "other run has. The verdict above is on the arms as they are written; this one is on each at its best values."
    ]
    if (best := tuned_study(study)) is not None:
        answer, _ = answered(best, headline(best))
        sentences.append(answer or "The tuned arms have no seed in common yet.")
    else:
        sentences.append("No arm that has finished runs is trained with other values than its own.")
    rows = [(arm.arm, said(arm.own), said(arm.best), len(arm.trials), arm.tokens, ladder(arm.trials)) for arm in tuned]
    headers = ("arm", "as written", "best", "short runs", "tokens", "bits per byte")
    yield Section("Tuning", sentences, headers, rows)


def said(values: Values) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items())


def ladder(trials: Sequence[Any]) -> str:
    """Scores of each rung, the best first."""
    rungs: dict[int, list[float]] = {}
    for trial in trials:
        rungs.setdefault(trial.seed, []).append(math.inf if trial.bpb is None else trial.bpb)
    return "; ".join(", ".join(f"{bpb:.4f}" for bpb in sorted(scores)) for scores in rungs.values())
