"""Runs of a study as its settings plan them: done, training, waiting."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsv3.reporting.history import History
from dsv3.reporting.overview import overview

WAITING = "waiting"
ENDED = ("finished", "failed")


class Job(NamedTuple):
    """An arm with a seed. `run` and `row` (`overview`) once it has a folder; `state` as there, or waiting."""

    arm: str
    seed: int
    state: str = WAITING
    run: History | None = None
    row: Mapping[str, Any] | None = None


def study_folder(run: History) -> Path | None:
    """The folder of the study that a run belongs to: above the parts of its name. None: it belongs to no study."""
    if not run.setting("study.arms"):
        return None
    path, name = run.folder.path, Path(str(run.setting("run.name")))
    depth = len(name.parts) if path.parts[-len(name.parts) :] == name.parts else 1
    return path.parents[depth - 1]


def jobs_of(runs: Sequence[History]) -> list[Job]:
    """Every arm with every seed, of all runs' settings: several commands may share a study's work."""
    planned: dict[tuple[str, int], None] = {}
    begun: dict[tuple[str, int], History] = {}
    for run in runs:
        study, seed = run.settings["study"], int(run.settings["seed"])
        seeds = [int(each) for each in study.get("seeds") or []]
        arms = study.get("only") or study["arms"]
        planned |= {(str(arm), each): None for each in (seeds if seed in seeds else [seed]) for arm in arms}
        if (arm := study.get("arm")) is not None:  # otherwise it only leads to others
            begun[str(arm), seed] = run
    found = []
    for arm, seed in [*planned, *(key for key in begun if key not in planned)]:
        known = begun.get((arm, seed))
        row = None if known is None else overview(known)
        found.append(Job(arm, seed) if row is None else Job(arm, seed, row["state"], known, row))
    return found


def seconds_left(jobs: Sequence[Job]) -> float | None:
    """Until all have ended, at the speed of the runs that train now, if as many train on; None: nothing trains, or
    nothing tells how fast."""
    rows = [job.row for job in jobs if job.row is not None]
    speeds = [
        (row["planned"] - row["tokens"]) / row["seconds_left"]
        for row in rows
        if row["state"] == "training" and row["seconds_left"]
    ]
    sizes = [row["planned"] for row in rows if row["planned"]]
    if not speeds or not sizes or sum(speeds) <= 0:
        return None
    trained = sum(job.row["tokens"] for job in jobs if job.row is not None and job.state not in ENDED)
    to_train = sum(job.state not in ENDED for job in jobs) * sum(sizes) / len(sizes)
    return max(0.0, to_train - trained) / sum(speeds)
