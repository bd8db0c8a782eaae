"""Expands a study (`study` in the config) into runs: every arm with every seed.

An arm is a list of overrides. Runs of one seed share the initial weights of all parameters whose names and shapes agree
(`dsv3.model.initialisation`) and, where the data's keys are the same, the order of the data: differences are paired.
"""

from collections.abc import Mapping, Sequence
from typing import Any


def expanded(job: Sequence[str], study: Mapping[str, Any] | None) -> list[list[str]]:
    """The overrides of each run: those of the arm, then `job`, which has the last word; no arms: `job` alone.

    Raises:
        ValueError: `study.only` names an arm that there is not.
    """
    if not study or not study["arms"]:
        return [list(job)]
    arms = study["arms"]
    names = list(arms) if study["only"] is None else list(study["only"])
    for name in names:
        if name not in arms:
            raise ValueError(f"study.only={name}: there is no such arm. Arms: {', '.join(arms)}")
    given = {override.partition("=")[0] for override in job}
    seeds = [[]] if "seed" in given else [[f"seed={seed}"] for seed in study["seeds"]]
    names = [name for name in names if "study.arm" not in given or f"study.arm={name}" in job]
    return [[*arms[name], *job, f"study.arm={name}", *seed] for seed in seeds for name in names]
