"""Verdict of a study: one sentence for each question."""

import math

from dsv3.reporting.paired import Difference
from dsv3.reporting.study_results import Metric, Study


def answered(study: Study, metric: Metric) -> tuple[str, bool]:
    """One sentence on how the arms differ from the baseline ("": there is nothing to compare), and whether one does
    significantly."""
    found = {arm: study.difference(metric, arm) for _, arm in study.compared()}
    known = {arm: difference for arm, difference in found.items() if difference is not None}
    clear = {arm: difference for arm, difference in known.items() if difference.significant}
    number, unit = (".1f", "percentage points") if metric.unit == "per cent" else (".4f", metric.unit)
    clauses = [
        f"{arm} is {direction(metric, difference)} than {study.baseline} by {abs(difference.mean):{number}} {unit} "
        f"(95% interval {difference.low:+{number}} to {difference.high:+{number}}, {difference.seeds} seeds)"
        for arm, difference in clear.items()
    ]
    alike: dict[str, list[str]] = {}
    for arm in known.keys() - clear.keys():
        alike.setdefault(kind_of(known[arm]), []).append(arm)
    for kind, arms in alike.items():
        effects = sorted(known[arm].detectable for arm in arms)
        about = " to ".join(dict.fromkeys(f"{effect:{number}}" for effect in (effects[0], effects[-1])))
        beyond = max(max(-known[arm].low, known[arm].high) for arm in arms)
        said = kind.format(baseline=study.baseline, beyond=f"{beyond:{number}}", effect=f"{about} {unit}")
        *others, last = [arm for arm in known if arm in arms]
        clauses.append(f"{', '.join(others)}{' and ' if others else ''}{last}: {said}")
    return (f"By {metric.name}, {'; '.join(clauses)}." if clauses else ""), bool(clear)


def kind_of(difference: Difference) -> str:
    """What is said of a difference that is not significant."""
    if difference.seeds == 1:
        return "one seed only, so the difference from {baseline} has no interval"
    if math.isnan(difference.detectable):
        return "equal to {baseline} with every seed"
    return (
        "no significant difference from {baseline}; more than {beyond} is excluded (minimum detectable effect {effect})"
    )


def direction(metric: Metric, difference: Difference) -> str:
    if metric.lower_is_better is None:
        return "higher" if difference.mean > 0 else "lower"
    return "better" if (difference.mean < 0) == metric.lower_is_better else "worse"
