"""Checks `study.match`, `study.tune` and `study.until` against the arms; types and ranges stand in `declared.py`."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dsv3.config.arms import stages_of
from dsv3.config.problems import Problem

MOST_CANDIDATES = 64
ADAPTIVE = ("match", "tune", "until")


def unfit_settings(study: Mapping[str, Any], job: Sequence[str], arms: Mapping[str, DictConfig]) -> Iterator[Problem]:
    """job: the command's overrides. arms: the config of each arm's run."""
    given = {override.partition("=")[0] for override in job}
    set_here = [key for key in ADAPTIVE if study.get(key)]
    if study.get("grid"):
        yield from (Problem(f"study.{key}", study[key], "cannot be combined with study.grid") for key in set_here)
    if isinstance(match := study.get("match"), Mapping):
        yield from unfit_match(match, given, arms)
    if isinstance(tune := study.get("tune"), Mapping) and tune:
        yield from unfit_tune(study, tune, given, arms)
    until, seeds = study.get("until"), study["seeds"]
    if isinstance(until, Mapping) and isinstance(most := until.get("most_seeds"), int) and most < len(seeds):
        yield Problem("study.until.most_seeds", most, f"must be at least {len(seeds)}, the seeds of study.seeds")


def unfit_match(match: Mapping[str, Any], given: set[str], arms: Mapping[str, DictConfig]) -> Iterator[Problem]:
    key, by = "study.match.by", match.get("by")
    if not isinstance(by, str):
        return
    if by in given:
        yield Problem(key, by, "is solved for each arm: leave it out of the command line")
    for name, config in arms.items():
        size = OmegaConf.select(config, by)
        if not isinstance(size, int) or isinstance(size, bool):
            yield Problem(key, by, f"must be the key of a size, such as model.moe_inter_dim; {name} has no such number")
            return


def unfit_tune(
    study: Mapping[str, Any], tune: Mapping[str, Any], given: set[str], arms: Mapping[str, DictConfig]
) -> Iterator[Problem]:
    for key, values in tune.items():
        name = f"study.tune.{key}"
        if not isinstance(values, list) or not values:
            yield Problem(name, values, "must be a list of values to try, such as [1e-3, 2e-3, 4e-3]")
            return
        if key in given:
            yield Problem(name, values, f"{key} is also set on the command line, which has the last word: leave it out")
        if any(OmegaConf.select(config, key) is None for config in arms.values()):
            yield Problem(name, values, f"{key} must be a key of every arm")
    count = math.prod(len(values) for values in tune.values())
    if not 2 <= count <= MOST_CANDIDATES:
        yield Problem("study.tune", dict(tune), f"has {count} combinations; must be between 2 and {MOST_CANDIDATES}")
    for arm, overrides in study["arms"].items():
        if len(stages_of(overrides)) > 1:
            yield Problem("study.tune", dict(tune), f"cannot tune {arm}, which has several stages")
