"""Runs of a study in the order in which they become known: sizes are matched, arms tuned, seeds added."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3.config.arms import expanded
from dsv3.config.declared import Until
from dsv3.study.matching import Compose, matched
from dsv3.study.rounds import first_seeds, next_round
from dsv3.study.tuning import Search, tuned_arms, write_tuning

Stages = list[list[list[str]]]
"""Runs as their overrides, stage by stage: all of one end before the next begins."""


def planned(study: Mapping[str, Any], job: Sequence[str], compose: Compose, folder: Path) -> Iterator[Stages]:
    """Parts of a study. The runs of each must have ended before the next is asked for.

    study: `study` of the config, with arms. job: the command's overrides. folder: the study's.

    Raises:
        ValueError: an arm cannot be matched; nothing was trained.
    """
    if study["match"]:
        study, found = matched(study, job, compose, folder)
        print("\n".join(found.lines()))
    best: dict[str, Any] = {}
    if study["tune"]:
        search = Search(study, job, compose)
        for rung in search.rungs():
            yield [rung]
        tuned = search.result()
        write_tuning(folder, tuned)
        best = tuned_arms(study, tuned)
    grows = bool(study["until"]) and not any(override.startswith("seed=") for override in job)
    seeds = first_seeds(study["seeds"], Until(**study["until"])) if grows else list(study["seeds"])
    yield with_tuned({**study, "seeds": seeds}, best, job)
    while grows and (more := next_round(folder, study, seeds)):
        seeds.append(more.seed)
        chosen = {name: arm for name, arm in best.items() if name in more.tuned}
        yield with_tuned({**study, "seeds": [more.seed], "only": more.arms}, chosen, job)


def with_tuned(study: Mapping[str, Any], best: Mapping[str, Any], job: Sequence[str]) -> Stages:
    """The runs of a study, and those of its tuned arms."""
    stages = expanded(job, study) if study["only"] != [] else [[]]
    if best:
        (tuned,) = expanded([*job, "study.tuned=best"], {**study, "arms": best, "only": None})
        stages[0] = stages[0] + tuned
    return stages
