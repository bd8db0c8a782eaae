"""Expands a study (`study` in the config) into runs: every arm with every seed.

An arm is a list of overrides, or a list of stages, each of which is one: a stage begins with the weights of the one
before, and arms whose first stages are the same share the runs of these. Runs of one seed share the initial weights of
all parameters whose names and shapes agree (`dsv3.model.initialisation`) and, where the data's keys are the same, the
order of the data: differences are paired.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

Stages = tuple[tuple[str, ...], ...]
"""Overrides of each stage of an arm."""


def expanded(job: Sequence[str], study: Mapping[str, Any] | None) -> list[list[list[str]]]:
    """Batches of runs, each run as its overrides; a batch needs the runs of those before it: one batch for each stage.

    Of a run, the overrides of its arm or stage come first, then `job`, which has the last word; no arms: `job` alone.

    Raises:
        ValueError: `study.only` names an arm that there is not.
    """
    if not study or not study["arms"]:
        return [[list(job)]]
    arms = {name: stages_of(arm) for name, arm in study["arms"].items()}
    names = list(arms) if study["only"] is None else list(study["only"])
    for name in names:
        if name not in arms:
            raise ValueError(f"study.only={name}: there is no such arm. Arms: {', '.join(arms)}")
    given = {override.partition("=")[0] for override in job}
    seeds = [[]] if "seed" in given else [[f"seed={seed}"] for seed in study["seeds"]]
    names = [name for name in names if "study.arm" not in given or f"study.arm={name}" in job]
    shown = {name: arms[name] for name in names}
    if all(len(stages) == 1 for stages in shown.values()):
        return [[[*arms[name][0], *job, f"study.arm={name}", *seed] for seed in seeds for name in names]]
    runs = _stages(shown)
    return [
        [[*stages[-1], *job, *_names(runs, stages), *seed] for seed in seeds for stages in runs if len(stages) == depth]
        for depth in range(1, 1 + max(map(len, runs)))
    ]


def stages_of(arm: Sequence[Any]) -> Stages:
    """An arm as its stages: overrides of each."""
    return tuple(map(tuple, arm)) if arm and not isinstance(arm[0], str) else (tuple(arm),)


def _stages(arms: Mapping[str, Stages]) -> dict[Stages, str | None]:
    """Every run that is needed, by its stages up to it, and the arm that it is; None: it only leads to others."""
    runs: dict[Stages, str | None] = {}
    for stages in arms.values():
        for depth in range(1, len(stages) + 1):
            runs.setdefault(stages[:depth], None)
    return runs | {stages: name for name, stages in arms.items()}


def _names(runs: Mapping[Stages, str | None], stages: Stages) -> list[str]:
    """Overrides that tell where a run lies, and where the one lies whose weights it begins with."""
    own = [f"study.arm={runs[stages] or 'null'}", f"study.stage={len(stages)}", f"run.name={_name(runs, stages)}"]
    if len(stages) == 1:
        return own
    return [*own, f"run.init_from=runs/${{run.experiment}}/{_name(runs, stages[:-1])}"]


def _name(runs: Mapping[Stages, str | None], stages: Stages) -> str:
    digest = hashlib.blake2b(json.dumps(stages).encode(), digest_size=4).hexdigest()
    return f"{runs[stages] or f'stages/{digest}'}/seed${{seed}}"
