"""Hydra's sweeper for `python train.py -m`: every arm of a study with every seed, and sweeps of the command line.

Hydra takes plugins from the namespace package `hydra_plugins` only; `conf/hydra/sweeper/study.yaml` chooses this one.
The jobs go to whatever launcher is chosen, in an order in which the arms of one seed follow each other. A job that
fails leaves the others to run; an interruption ends them all. After the last one the study's report is written.
"""

import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cache, partial
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dsv3.checkpoint.run_folder import RunFolder
from dsv3.cli import user_errors
from dsv3.config.arms import expanded
from dsv3.paths import CONF, ROOT
from dsv3.runtime import device_named, launched_rank
from dsv3.study.run_queue import MOST_DEATHS, Entry, Queue
from dsv3.study.worker import POLL
from dsv3.tools.report import report_of_ended

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


def attempt(task: TaskFunction, study: Path, config: DictConfig) -> int:
    """Exit status of one job: 0, or 1 where it failed and has said why; 0, too, where another worker has its run."""
    from dsv3.training.launch import started  # torch, which Hydra's start does not wait for

    queue = Queue(study)
    run = place(config.run.dir, study)
    entry = queue.entry(run) if run is not None else None
    if entry is None:
        return int(trained(task, config) is not None)
    if started():  # several ranks train, all of which have to begin: they do not ask whether they may
        why = trained(task, config)
        if why is not None and launched_rank() == 0:
            queue.fail(entry, why)
        return int(why is not None)
    with queue.claimed(entry) as mine:
        why = trained(task, config) if mine else None
        if why is not None:
            queue.fail(entry, why)
    return int(why is not None)


def trained(task: TaskFunction, config: DictConfig) -> str | None:
    """Run the job; why it failed, which it has said, or None.

    Raises:
        SystemExit: it was interrupted.
    """
    why = "see its output"
    try:
        task(config)
    except SystemExit as end:
        if end.code not in (1, 2):  # interrupted
            raise
    except Exception as error:
        traceback.print_exc()
        why = f"{type(error).__name__}: {error}"
    else:
        return None
    print(f"{config.run.dir} failed", file=sys.stderr)
    return RunFolder(config.run.dir).failure() or why


def place(folder: str, study: Path) -> str | None:
    """A folder within the study's, relative to it; None: it is elsewhere."""
    path = Path(os.path.normpath(Path(folder).absolute()))
    return str(path.relative_to(study)) if study in path.parents else None


def share_imports(config: DictConfig) -> None:
    """Let the processes of other launchers, on whatever machine, import what this one does: the project, and modules
    next to the configurations in `--config-dir`."""
    folders = [Path(s.path) for s in config.hydra.runtime.config_sources if s.provider == "command-line"]
    places = [ROOT, *(place for folder in folders for place in (folder, folder.parent))]
    before = [place for place in [os.environ.get("PYTHONPATH")] if place]
    os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, places), *before])


def runs_of(
    job: list[str], study: Mapping[str, Any] | None, composed: Callable[[list[str]], DictConfig]
) -> list[list[list[str]]]:
    """Batches of a study's runs, as `expanded`; those of an IsoFLOP grid from the cheapest to the most expensive.

    composed: overrides -> the config of a run.
    """
    if not study or not study.get("grid"):
        return expanded(job, study)
    from dsv3.study.isoflop import cells  # torch, which Hydra's start does not wait for

    batches = [
        expanded(job, {**study, "arms": {cell.arm: cell.overrides}, "only": None})
        for cell in cells(composed, job, study)
    ]
    return [[run for (runs,) in batches for run in runs]]


class StudySweeper(BasicSweeper):
    """Hydra's own sweeper, with each of its jobs run once for each arm and seed of `study`, if there are arms.

    It writes the queue of the study (`dsv3.study.run_queue`) and gives the launcher the jobs of a stage; where another
    worker has taken one, it waits for that, and runs it if that worker dies.
    """

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.study = Path(config.hydra.sweep.dir).absolute()
        self.queue = Queue(self.study)
        task = partial(attempt, task_function, self.study)
        super().setup(hydra_context=hydra_context, task_function=task, config=config)

    def split_arguments(self, overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        assert self.config is not None
        (jobs,) = BasicSweeper.split_arguments(overrides, None)
        self.entries: list[Entry] = []
        self.batches = self.batches_of(jobs, max_batch_size)
        return []

    def parts_of(self, jobs: Sequence[list[str]]) -> Iterator[list[list[list[str]]]]:
        """Stages of runs; a study that is matched, tuned or adds seeds comes in parts, each of which needs the runs of
        the one before.

        Raises:
            ValueError: such a study is one of several in a sweep, or an arm cannot be matched.
        """
        assert self.config is not None
        study: Any = OmegaConf.to_container(self.config.get("study") or OmegaConf.create(), resolve=True)
        adaptive = [key for key in ("match", "tune", "until") if study and study.get("arms") and study.get(key)]
        if not adaptive:
            batches = [runs_of(job, study, self.composed) for job in jobs]
            stages: list[list[list[str]]] = []
            for depth, runs in ((depth, runs) for of_job in batches for depth, runs in enumerate(of_job)):
                stages.extend([[]] * (depth + 1 - len(stages)))
                stages[depth] = stages[depth] + runs
            yield stages
            return
        if len(jobs) > 1:
            raise ValueError(f"study.{adaptive[0]}: a study that sets it is run alone, not in a sweep of {len(jobs)}")
        from dsv3.study.study_parts import planned  # torch, which Hydra's start does not wait for

        yield from planned(study, jobs[0], self.composed, self.study)

    def composed(self, job: list[str]) -> DictConfig:
        assert self.config is not None
        assert self.hydra_context is not None
        return self.hydra_context.config_loader.load_sweep_config(self.config, job)

    def entries_of(self, jobs: Sequence[list[str]]) -> list[Entry]:
        """Those of the queue; none where the jobs do not all lie in the study's folder, each in a folder of its own."""
        entries: list[Entry] = []
        for number, job in enumerate(jobs, len(self.entries)):
            config = self.composed(job)
            try:
                run, begins = (
                    place(config.run.dir, self.study),
                    config.run.init_from and place(config.run.init_from, self.study),
                )
            except OmegaConfBaseException:  # it is made of what only Hydra knows, such as a job's number
                return []
            if run is None:
                return []
            after = begins if any(begins == entry.run for entry in entries) else None
            entries.append(Entry(run, job, number, after, config.run.tokens))
        return entries

    def batches_of(self, jobs: Sequence[list[str]], size: int | None) -> Iterator[list[list[str]]]:
        """What the launcher is given: every job of a stage, then, again, those whose workers elsewhere died."""
        assert self.config is not None
        with ExitStack() as held:
            for part in self.parts_of(jobs):
                stages = [[settled(run, self.config) for run in runs] for runs in part]
                entries = self.entries_of([run for runs in stages for run in runs])
                self.queue.write(entries, retry=True)
                if entries and not self.entries:
                    held.enter_context(self.queue.growing())
                self.entries += entries
                yield from self.batches_of_part(stages, entries, size)

    def batches_of_part(
        self, stages: Sequence[list[list[str]]], entries: Sequence[Entry], size: int | None
    ) -> Iterator[list[list[str]]]:
        by_job = {tuple(entry.overrides): entry.name for entry in entries}
        for stage in stages:
            yield from BasicSweeper.split_overrides_to_chunks(stage, size)
            names = {by_job[tuple(job)] for job in stage} if entries else set()
            for _ in range(MOST_DEATHS):
                while any(run.state == "running" and run.entry.name in names for run in self.queue.states()):
                    time.sleep(POLL)
                left = {entry.name for entry in self.queue.ready()}
                if again := [job for job in stage if entries and by_job[tuple(job)] in left]:
                    yield from BasicSweeper.split_overrides_to_chunks(again, size)

    def is_done(self) -> bool:
        """Hydra asks before each batch."""
        with user_errors():
            self.batch = next(self.batches, None)
        return self.batch is None

    def get_job_batch(self) -> Sequence[Sequence[str]]:
        assert self.batch is not None
        return self.batch

    def sweep(self, arguments: list[str]) -> Any:
        assert self.config is not None
        share_imports(self.config)
        returns = super().sweep(arguments)
        study = self.config.get("study") or {}
        if study.get("arms"):
            with user_errors():
                report_of_ended(self.study, study)
        jobs = [job for batch in returns for job in batch]
        failed, of = sum(job.return_value for job in jobs), len(jobs)
        if self.entries:  # of which others may have trained some
            names = {entry.name for entry in self.entries}
            failed, of = sum(r.entry.name in names and r.state == "failed" for r in self.queue.states()), len(names)
        if failed:
            print(f"error: {failed} of {of} runs failed", file=sys.stderr)
            sys.exit(1)
        return returns
