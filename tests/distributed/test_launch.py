"""Launching over two processes: by train.py itself, by srun, in a sweep, and in a study over SLURM; hangs and kills.

SLURM is a fake of three scripts, with one node, which is this machine.
"""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest

from dsv3.checkpoint.run_folder import RunFolder
from dsv3.distributed.agree import rank
from tests.conftest import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

FAKE = ROOT / "tests" / "distributed" / "fake_slurm"
SETTINGS = (
    "--config-dir", str(ROOT / "tests" / "conf"), "model=tiny", "data=synthetic", "tokenizer=bytes", "precision=fp32",
    "logger=none", "benchmarks=none", "parallel=sharded",
)  # fmt: skip
JOB = {
    "SLURM_JOB_ID": "4242", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NNODES": "1", "SLURM_JOB_NODELIST": "localhost", "SLURM_NODELIST": "localhost",
}  # fmt: skip


def start(folder: Path, *command: str, **environment: str) -> "subprocess.Popen[str]":
    """Start a command in a shell whose PYTHONPATH says nothing of the project."""
    path = os.pathsep.join([str(FAKE), str(Path(sys.executable).parent), os.environ["PATH"]])
    own = {"PATH": path, "FAKE_SLURM": str(folder / "states"), "OMP_NUM_THREADS": "1", **environment}
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.Popen(command, cwd=folder, env=kept | own, stdout=-1, stderr=-1, text=True)


def train(*arguments: str, devices: str = "2", steps: int = 4) -> tuple[str, ...]:
    lengths = (f"trainer.devices={devices}", f"run.tokens={256 * steps}")
    return sys.executable, str(ROOT / "train.py"), *SETTINGS, *lengths, *arguments


def finished(process: "subprocess.Popen[str]") -> str:
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors
    return output


def losses(folder: Path) -> list[float]:
    return RunFolder(folder).read("metrics/train").loss.tolist()


def test_srun_trains_as_train_py_does(tmp_path: Path) -> None:
    own = finished(start(tmp_path, *train("run.dir=own")))
    by_srun = finished(start(tmp_path, "srun", *train("run.dir=srun"), **JOB))
    assert len(losses(tmp_path / "own")) == 4
    assert losses(tmp_path / "srun") == losses(tmp_path / "own")
    for output in (own, by_srun):
        assert output.count("run folder") == 1, "of two ranks the first shows the run"


def test_each_job_of_a_sweep_starts_ranks_of_its_own(tmp_path: Path) -> None:
    """With as many devices as it asks for."""
    sweep = train("hydra.mode=MULTIRUN", "run.name=devices${trainer.devices}", devices="1,2")
    output = finished(start(tmp_path, *sweep))
    assert output.count("run folder") == 2
    one, two = (tmp_path / "runs" / "default" / f"devices{devices}" for devices in (1, 2))
    assert losses(one) == pytest.approx(losses(two), rel=1e-4)
    assert [RunFolder(folder).config().trainer.devices for folder in (one, two)] == [1, 2]


@pytest.mark.parametrize("tasks", [2, 1])
def test_a_study_over_slurm(tmp_path: Path, tasks: int) -> None:
    """Started from another folder. With one task per node, that one starts the ranks."""
    study = (
        "experiment=table5_balancing", "study.only=[sequence_aux,loss_free]", "study.seeds=[1]",
        f"run.dir={tmp_path}/study/${{study.arm}}", f"hydra.sweep.dir={tmp_path}/study",
        "hydra/launcher=submitit_slurm", f"hydra.launcher.tasks_per_node={tasks}",
    )  # fmt: skip
    output = finished(start(tmp_path, *train(*study)))
    assert "By held-out text at equal tokens:" in output
    for arm in ("sequence_aux", "loss_free"):
        assert len(losses(tmp_path / "study" / arm)) == 4
    assert (tmp_path / "states").read_text().count("COMPLETED") == 2
    assert len(list((tmp_path / "study" / ".submitit").glob("*/*_log.out"))) == 2 * tasks


class Sleeper(lightning.Callback):
    """Rank 1 sleeps in the third step; or all ranks do, and keep Python's lock."""

    def __init__(self, *, keep_lock: bool) -> None:
        self.keep_lock = keep_lock

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        def sleep() -> bool:
            if pl_module.steps == 2 and self.keep_lock:
                ctypes.PyDLL(None).sleep(100)
            if pl_module.steps == 2 and rank() == 1:
                time.sleep(100)
            return False

        pl_module.flags["sleeper"] = sleep


def sleeper(*, keep_lock: bool) -> tuple[str, str]:
    where = "+callbacks.sleeper"
    return f"{where}._target_={__name__}.Sleeper", f"{where}.keep_lock={str(keep_lock).lower()}"


def test_a_hang_ends_the_job_and_names_the_rank(tmp_path: Path) -> None:
    process = start(tmp_path, *train("run.dir=run", *sleeper(keep_lock=False), "callbacks.watchdog.seconds=5"))
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 1, errors
    assert "rank 1 has been in step 3 for over 5 s" in errors
    assert "time.sleep(100)" in errors
    assert errors.rstrip().endswith("rank 1 ended with status 1; the others were stopped")
    assert (RunFolder(tmp_path / "run").failure() or "").startswith("rank 1 has been in step 3")


def test_ranks_that_all_keep_the_lock_are_named_by_what_started_them(tmp_path: Path) -> None:
    process = start(tmp_path, *train("run.dir=run", *sleeper(keep_lock=True), "callbacks.watchdog.seconds=5"))
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 1, errors
    line = "has been in step 3 for over 5 s (callbacks.watchdog.seconds), where no thread of it could run"
    assert line in errors
    assert "in sleep" in errors
    failure = RunFolder(tmp_path / "run").failure() or ""
    assert failure[:6] in ("rank 0", "rank 1")
    assert line in failure
    named = Path(tmp_path, "run", failure.split()[-1]).read_text()
    assert named.startswith(failure[:6])
    assert "in sleep" in named


def test_a_killed_rank_is_named_and_the_same_command_goes_on(tmp_path: Path) -> None:
    command = train("run.dir=run", "run.checkpoint_every_tokens=256", steps=60)
    process = start(tmp_path, *command)
    while not RunFolder(tmp_path / "run").checkpoints():
        assert process.poll() is None
        time.sleep(0.05)
    (second,) = [pid for pid in descendants(process.pid) if b"\0RANK=1\0" in environment_of(pid)]
    os.kill(second, signal.SIGKILL)
    killed = time.monotonic()
    _, errors = process.communicate(timeout=100)
    assert time.monotonic() - killed < 35
    assert process.returncode == 128 + signal.SIGKILL
    assert errors.rstrip().endswith("rank 1 was ended by SIGKILL; the others were stopped")
    finished(start(tmp_path, *command))
    assert len(losses(tmp_path / "run")) == 60


def test_out_of_time_stops_all_ranks_with_a_checkpoint(tmp_path: Path) -> None:
    """By SIGUSR1 to the program that started them, then by a limit of time; the program at the end is called once."""
    command = train("run.dir=run", f"run.on_end=[{sys.executable}, {FAKE.parent}/note_end.py, ended]", steps=60)
    process = start(tmp_path, *command, "run.checkpoint_every_tokens=256")
    while not RunFolder(tmp_path / "run").checkpoints():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=400)
    assert process.returncode == 75, errors
    begun = len(losses(tmp_path / "run"))
    late = start(tmp_path, *command, "run.checkpoint_every_tokens=256", "trainer.max_time=00:00:00:01")
    _, errors = late.communicate(timeout=400)
    assert late.returncode == 75, errors
    assert errors.count("trainer.max_time is over: saving a checkpoint") == 1
    assert len(losses(tmp_path / "run")) == begun + 1, "the time is over in the first step, on both ranks"
    finished(start(tmp_path, *command, "run.checkpoint_every_tokens=256"))
    assert len(losses(tmp_path / "run")) == 60
    states = [f"{tmp_path}/run {state}" for state in ("interrupted", "interrupted", "finished")]
    assert (tmp_path / "ended").read_text().splitlines() == states


def descendants(pid: int) -> Iterator[int]:
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        yield int(child)
        yield from descendants(int(child))


def environment_of(pid: int) -> bytes:
    return b"\0" + Path(f"/proc/{pid}/environ").read_bytes()
