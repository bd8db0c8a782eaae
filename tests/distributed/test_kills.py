"""Ranks that are killed at random moments, also while they save: the run ends as the uninterrupted one."""

import contextlib
import random
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from dsv3.checkpoint.parts import tokens_of
from dsv3.checkpoint.run_folder import RunFolder
from tests.distributed.ranks import Trained, train
from tests.distributed.workers import Workers

Compose = Callable[..., DictConfig]
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

KILLS = 20
STEP = 256  # tokens of a step of the synthetic data
STEPS_PER_KILL = 3  # from which a rank is killed at once, so that the run lasts for all kills
LONGEST = 500.0  # seconds of a whole run
RUN = (
    "parallel=sharded",
    "trainer.devices=2",
    "precision=fp32",
    "callbacks.monitor=null",
    f"run.tokens={2 * KILLS * STEPS_PER_KILL * STEP}",
    f"run.checkpoint_every_tokens={2 * STEP}",
    f"run.validate_every_tokens={16 * STEP}",
)


class Killer(threading.Thread):
    """Kills a random rank, in every second run while a checkpoint is written, else after up to nine seconds."""

    def __init__(self, workers: Workers, folder: RunFolder, chance: random.Random, *, saving: bool) -> None:
        super().__init__()
        self.folder, self.saving = folder, saving
        self.process = workers.processes[chance.randrange(2)]
        self.moment = time.monotonic() + chance.uniform(0, 9)
        self.delay = chance.uniform(0, 0.03)
        self.first = self.trained()
        self.killed_in_save = False

    def trained(self) -> int:
        return max((tokens_of(path) for path in self.folder.checkpoints()), default=0)

    def run(self) -> None:
        while not self.is_due():
            time.sleep(0.002)
        if self.saving:
            time.sleep(self.delay)
        self.killed_in_save = self.is_saving()
        self.process.kill()

    def is_saving(self) -> bool:
        return any((self.folder.path / "checkpoints").glob(".*.tmp"))

    def is_due(self) -> bool:
        late = self.trained() >= self.first + STEPS_PER_KILL * STEP
        return late or (self.is_saving() if self.saving else time.monotonic() > self.moment)


def killed_again_and_again(workers: Workers, config: DictConfig, seed: int) -> dict[str, int]:
    """Start and kill the run; what of the kills there is to say."""
    folder, chance = RunFolder(config.run.dir), random.Random(seed)
    said = {"kills": 0, "before a new checkpoint": 0, "while a checkpoint was written": 0}
    for number in range(KILLS):
        if not all(process.is_alive() for process in workers.processes):
            workers.close()
            workers._start()
        killer = Killer(workers, folder, chance, saving=number % 2 == 1)
        killer.start()
        with contextlib.suppress(Exception):  # the survivor's, of a broken connection
            workers.run(train, config, ranks=2, timeout=40)
        killer.join()
        assert killer.process.exitcode == -signal.SIGKILL
        said["kills"] += 1
        said["before a new checkpoint"] += killer.trained() == killer.first
        said["while a checkpoint was written"] += killer.killed_in_save
    return said


def assert_equal(ours: Trained, whole: Trained) -> None:
    assert (ours.losses == whole.losses).all()
    assert (ours.bpb == whole.bpb).all()
    assert ours.loads == whole.loads
    assert ours.biases == whole.biases
    for mine, theirs in ((ours.weights, whole.weights), (ours.averaged, whole.averaged)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], tensor) for name, tensor in theirs.items())


@pytest.mark.parametrize("checkpoint_format", ["file", "folder"])
def test_a_run_whose_ranks_are_killed_is_the_uninterrupted_run(
    composed: Compose, workers: Workers, tmp_path: Path, checkpoint_format: str
) -> None:
    def run_of(name: str) -> DictConfig:
        return composed(*RUN, f"run.checkpoint_format={checkpoint_format}", f"run.dir={tmp_path / name}")

    whole, _ = workers.run(train, run_of("whole"), ranks=2, timeout=LONGEST)
    said = killed_again_and_again(workers, run_of("killed"), seed=len(checkpoint_format))
    ours, _ = workers.run(train, run_of("killed"), ranks=2, timeout=LONGEST)
    print(f"{checkpoint_format}: {said}")
    assert said["while a checkpoint was written"] >= KILLS // 4
    assert_equal(ours, whole)
    assert not list(tmp_path.rglob(".*.tmp"))
