"""Hydra's sweeper for `python train.py -m`: every arm of a study with every seed, and what the command line sweeps.

Hydra takes plugins from the namespace package `hydra_plugins` only; `conf/hydra/sweeper/study.yaml` chooses this one.
The jobs go to whatever launcher is chosen, in an order in which the arms of one seed follow each other.
"""

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.types import Override

from dsv3.study.arms import expanded


class StudySweeper(BasicSweeper):
    """Hydra's own sweeper, with each of its jobs run once for each arm and seed of `study`, if there are arms."""

    def split_arguments(self, overrides: list[Override], max_batch_size: int | None) -> list[list[list[str]]]:
        assert self.config is not None
        (jobs,) = BasicSweeper.split_arguments(overrides, None)
        jobs = [arm for job in jobs for arm in expanded(job, self.config.get("study"))]
        return list(BasicSweeper.split_overrides_to_chunks(jobs, max_batch_size))
