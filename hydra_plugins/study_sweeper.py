"""Hydra's sweeper for `python train.py -m`: every arm of a study with every seed, and what the command line sweeps.

Hydra takes plugins from the namespace package `hydra_plugins` only; `conf/hydra/sweeper/study.yaml` chooses this one.
The jobs go to whatever launcher is chosen, in an order in which the arms of one seed follow each other. When the last
one is done, the study's report is written.
"""

import logging
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override

from dsv3.config.arms import expanded
from dsv3.tools import report

log = logging.getLogger(__name__)


class StudySweeper(BasicSweeper):
    """Hydra's own sweeper, with each of its jobs run once for each arm and seed of `study`, if there are arms."""

    def split_arguments(self, overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        assert self.config is not None
        (jobs,) = BasicSweeper.split_arguments(overrides, None)
        jobs = [arm for job in jobs for arm in expanded(job, self.config.get("study"))]
        return list(BasicSweeper.split_overrides_to_chunks(jobs, max_batch_size))

    def sweep(self, arguments: list[str]) -> Any:
        returns = super().sweep(arguments)
        assert self.config is not None
        if (self.config.get("study") or {}).get("arms"):
            try:
                report.run(report.Options(folder=self.config.hydra.sweep.dir))
            except (FileNotFoundError, ValueError) as error:  # `run.dir` sent runs elsewhere, or no such `study.metric`
                log.warning("No report of the study: %s", error)
        return returns
