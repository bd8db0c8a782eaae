"""Checks the runs of a study: composes each arm's overrides like those of the command line."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dsv3.config.arms import expanded
from dsv3.config.compose import COMPOSITION_ERRORS, Composer
from dsv3.config.overrides import first_line
from dsv3.config.problems import Problem
from dsv3.config.study_settings import unfit_settings


def arms_of(composer: Composer, job: Sequence[str]) -> tuple[list[list[str]], list[Problem]]:
    """The job itself and one of each arm's runs, where it is a study; and the arms that do not compose."""
    config = composer.compose(job)
    study = study_of(config)
    if not study or not study["arms"]:
        return [list(job)], []
    if problems := list(misshapen(study)):
        return [list(job)], problems
    try:
        batches = expanded(job, study | {"seeds": study["seeds"][:1]})
    except ValueError as error:
        return [list(job)], [Problem("study.only", study["only"], str(error).partition(": ")[2])]
    fitting, problems, arms = [list(job)], [], {}
    for run in (run for batch in batches for run in batch):
        name = next(override for override in run if override.startswith("study.arm=")).partition("=")[2]
        try:
            arms[name] = composer.compose(run)
        except COMPOSITION_ERRORS as error:
            problems.append(Problem(f"study.arms.{name}", study["arms"].get(name, run), first_line(error)))
        else:
            fitting.append(run)
    return fitting, [*problems, *unfit_settings(study, job, arms)]


def shared_folders(composer: Composer, runs: Sequence[Sequence[str]], *, multirun: bool) -> Iterator[Problem]:
    """A problem for each folder that several runs of a sweep would write to. `runs`: an arm's with its first seed.

    multirun: whether the command says so; an experiment may, too.
    """
    writers: dict[str, list[Sequence[str]]] = {}
    for run in runs:
        composed = composer.compose(run)
        if not multirun and composed.hydra.mode != RunMode.MULTIRUN:
            continue
        config = copy.deepcopy(composed)
        study = study_of(config)
        every = bool(study and study["arms"]) and run[-1].startswith("seed=")  # put there by `expanded`
        for seed in study["seeds"] if study and every else [config.get("seed")]:
            config.seed = seed
            try:
                writers.setdefault(config.run.dir, []).append([*run[:-1], f"seed={seed}"] if every else run)
            except OmegaConfBaseException:  # it is made of what only Hydra knows, such as a job's number
                continue
    for folder, jobs in writers.items():
        if len(jobs) > 1:
            one, other = ([o for o in job if o not in next_to] for job, next_to in (jobs[:2], jobs[1::-1]))
            message = f"{len(jobs)} runs would write to this folder, such as '{' '.join(one)}' and '{' '.join(other)}'"
            fix = "let run.name hold what differs, such as run.name='lr${schedule.peak}/seed${seed}'"
            yield Problem("run.dir", folder, f"{message}; {fix}")


def study_of(config: DictConfig) -> dict[str, Any] | None:
    study = OmegaConf.select(config, "study")
    return OmegaConf.to_container(study, resolve=True) if study is not None else None  # type: ignore[return-value]


def misshapen(study: Mapping[str, Any]) -> Sequence[Problem]:
    """What would not even give runs."""
    arms = study["arms"]
    if not isinstance(arms, dict):
        return [Problem("study.arms", arms, "must be a mapping: name of an arm -> list of overrides")]
    problems = [
        Problem(
            f"study.arms.{name}",
            arm,
            "must be a list of overrides, such as [balancing=none], or a list of stages, each of which is one",
        )
        for name, arm in arms.items()
        if not (_is_stage(arm) or (isinstance(arm, list) and arm and all(map(_is_stage, arm))))
    ]
    if not (isinstance(study["seeds"], list) and study["seeds"]):
        problems.append(Problem("study.seeds", study["seeds"], "must be a list of at least one seed"))
    if study["baseline"] is not None and study["baseline"] not in arms:
        problems.append(Problem("study.baseline", study["baseline"], f"must be one of {', '.join(arms)}"))
    if study["only"] is not None and not isinstance(study["only"], list):
        problems.append(Problem("study.only", study["only"], "must be a list of names of arms"))
    return problems


def _is_stage(overrides: Any) -> bool:
    return isinstance(overrides, list) and all(isinstance(override, str) for override in overrides)
