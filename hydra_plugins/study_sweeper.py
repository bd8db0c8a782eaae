"""Hydra's sweeper for `python train.py -m`: every arm of a study with every seed, and sweeps of the command line.

Hydra takes plugins from the namespace package `hydra_plugins` only; `conf/hydra/sweeper/study.yaml` chooses this one.
The jobs go to whatever launcher is chosen, in an order in which the arms of one seed follow each other. A job that
fails leaves the others to run; an interruption ends them all. After the last one the study's report is written.
"""

import logging
import os
import sys
import traceback
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

from hydra import compose
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from dsv3.config.arms import expanded
from dsv3.paths import CONF, ROOT
from dsv3.runtime import device_named
from dsv3.tools import report

log = logging.getLogger(__name__)

AUTO = "auto"
"""The option of `precision` that probes the machine."""


def settled(job: list[str], config: DictConfig) -> list[str]:
    """The job with the choice that `precision=auto` makes on this machine, wherever the job then runs."""
    chosen = [override.partition("=")[2] for override in job if override.startswith("precision=")]
    named = chosen[-1] if chosen else config.hydra.runtime.choices.get("precision")
    given = any(override.startswith("precision.choice=") for override in job)
    return job if named != AUTO or given else [*job, *_probed(config.trainer.accelerator)]


@cache
def _probed(accelerator: str) -> list[str]:
    from dsv3.build import part  # torch, which Hydra's start does not wait for

    device = device_named(accelerator, key="trainer.accelerator")
    choices, why = part(OmegaConf.load(CONF / "precision" / f"{AUTO}.yaml")).settle(device)
    log.info("precision of every job: %s", why)
    return [f"precision.{key}={value}" for key, value in choices.items()]


def attempt(task: TaskFunction, config: DictConfig) -> int:
    """Exit status of one job: 0, or 1 where it failed and has said why."""
    try:
        task(config)
    except SystemExit as end:
        if end.code not in (1, 2):  # interrupted
            raise
    except Exception:
        traceback.print_exc()
    else:
        return 0
    print(f"{config.run.dir} failed", file=sys.stderr)
    return 1


def share_imports(config: DictConfig) -> None:
    """Let the processes of other launchers, on whatever machine, import what this one does: the project, and modules
    next to the configurations in `--config-dir`."""
    folders = [Path(s.path) for s in config.hydra.runtime.config_sources if s.provider == "command-line"]
    places = [ROOT, *(place for folder in folders for place in (folder, folder.parent))]
    before = [place for place in [os.environ.get("PYTHONPATH")] if place]
    os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, places), *before])


def write_report(folder: Path, study: Mapping[str, Any]) -> None:
    """With the settings of `study` as they are now, whatever finished runs have recorded."""
    from dsv3.reporting.study_results import read_study  # pandas, which Hydra's start does not wait for

    try:
        report.write_study(read_study(folder, study), folder)
    except (FileNotFoundError, ValueError) as error:  # no run finished, or `run.dir` sent them elsewhere
        log.warning("No report of the study: %s", error)


def runs_of(job: list[str], study: Mapping[str, Any] | None) -> list[list[list[str]]]:
    """Batches of a study's runs, as `expanded`; those of an IsoFLOP grid from the cheapest to the most expensive."""
    if not study or not study.get("grid"):
        return expanded(job, study)
    from dsv3.study.isoflop import cells  # torch, which Hydra's start does not wait for

    batches = [
        expanded(job, {**study, "arms": {cell.arm: cell.overrides}, "only": None})
        for cell in cells(lambda overrides: compose("train", overrides=overrides), job, study)
    ]
    return [[run for (runs,) in batches for run in runs]]


class StudySweeper(BasicSweeper):
    """Hydra's own sweeper, with each of its jobs run once for each arm and seed of `study`, if there are arms."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        super().setup(hydra_context=hydra_context, task_function=partial(attempt, task_function), config=config)

    def split_arguments(self, overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        assert self.config is not None
        (jobs,) = BasicSweeper.split_arguments(overrides, None)
        stages: list[list[list[str]]] = []
        for job in jobs:
            for depth, runs in enumerate(runs_of(job, self.config.get("study"))):
                stages.extend([[]] * (depth + 1 - len(stages)))
                stages[depth] = stages[depth] + [settled(run, self.config) for run in runs]
        return [chunk for runs in stages for chunk in BasicSweeper.split_overrides_to_chunks(runs, max_batch_size)]

    def sweep(self, arguments: list[str]) -> Any:
        assert self.config is not None
        share_imports(self.config)
        returns = super().sweep(arguments)
        study = self.config.get("study") or {}
        if study.get("arms"):
            write_report(Path(self.config.hydra.sweep.dir), study)
        jobs = [job for batch in returns for job in batch]
        if failed := sum(job.return_value for job in jobs):
            print(f"error: {failed} of {len(jobs)} runs failed", file=sys.stderr)
            sys.exit(1)
        return returns
