"""Seeds that a study trains next by the rule of `study.until` (`dsv3.reporting.sequential`).

The runs that are there decide, so that a study that was interrupted goes on as it would have.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsv3.config.declared import Until
from dsv3.reporting.paired import Difference
from dsv3.reporting.sequential import FIRST_LOOK
from dsv3.reporting.study_results import Study, headline, read_study
from dsv3.study.tuning import BEST, tuned_study


class Round(NamedTuple):
    """A seed to train with. arms, tuned: names of those that need it; tuned ones are at their best values."""

    seed: int
    arms: list[str]
    tuned: list[str]


def first_seeds(seeds: Sequence[int], until: Until) -> list[int]:
    """Those of the study, and as many more as the first look needs."""
    found = list(seeds)
    while len(found) < min(FIRST_LOOK, until.most_seeds):
        found.append(max(found) + 1)
    return found


def next_round(folder: Path, settings: Mapping[str, Any], so_far: Sequence[int]) -> Round | None:
    """The next seed, of the arms that are not settled by the seeds so far, and of the baseline; None: no more.

    settings: `study` of the config. Where no run is finished there is nothing to decide by, and no more.
    """
    until = Until(**settings["until"])
    try:
        study = read_study(folder, settings)
    except FileNotFoundError:
        return None
    tuned = tuned_study(study)
    seed, most = max(so_far) + 1, until.most_seeds
    if len(so_far) >= most:
        return None
    arms, of_tuned = (unsettled(part, so_far) if part else [] for part in (study, tuned))
    if settings["only"] is not None:
        arms, of_tuned = ([arm for arm in names if arm in settings["only"]] for names in (arms, of_tuned))
    own = [arm for arm in of_tuned if tuned and tuned.runs[arm] is study.runs.get(arm)]  # best at their own values
    best = [BEST.format(arm) for arm in of_tuned if arm not in own]
    arms = [arm for arm in study.runs if arm in {*arms, *own}]
    if not arms and not best:
        return None
    hours = hours_of(study, so_far)
    runs = sum(len(seeds) for seeds in study.runs.values())
    if until.most_hours is not None and hours * (1 + (len(arms) + len(best)) / runs) > until.most_hours:
        return None
    return Round(seed, arms, best)


def unsettled(study: Study, so_far: Sequence[int]) -> list[str]:
    """Arms that need another seed, and the baseline with them; [] where none does."""
    runs = {arm: {seed: run for seed, run in seeds.items() if seed in so_far} for arm, seeds in study.runs.items()}
    study = study._replace(runs={arm: seeds for arm, seeds in runs.items() if seeds})
    metric = headline(study)
    differences = {arm: study.difference(metric, arm) for _, arm in study.compared()}
    going = [arm for arm, difference in differences.items() if difference and needs_more(difference, study)]
    return [study.baseline, *going] if going else []


def needs_more(difference: Difference, study: Study) -> bool:
    """Not where the held-out documents alone leave an interval too wide, and around zero: no seed makes it narrower."""
    assert study.until is not None
    hopeless = difference.documents > max(study.until["half_width"], abs(difference.mean))
    return not difference.settled and not hopeless


def hours_of(study: Study, so_far: Sequence[int]) -> float:
    """Of training, all runs of these seeds together."""
    summaries = [run.summary or {} for runs in study.runs.values() for seed, run in runs.items() if seed in so_far]
    return sum(summary.get("seconds", 0.0) for summary in summaries) / 3600
