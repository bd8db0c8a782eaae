"""A rank that hangs is named, with its stack, and the run ends; long work of callbacks is no hang."""

import ctypes
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch.distributed as dist
from omegaconf import DictConfig

from dsv3.checkpoint.run_folder import RunFolder
from dsv3.contracts import Step
from dsv3.testing.callback import check_callback
from dsv3.training import lightning_module
from dsv3.training.callbacks.validate import Validate
from dsv3.training.callbacks.watchdog import TO_WAIT, Watchdog
from dsv3.training.frozen import name_frozen
from dsv3.training.resume import prepare
from tests.distributed.ranks import fitted
from tests.distributed.workers import Workers
from tests.synthetic import SyntheticData

Compose = Callable[..., DictConfig]
LIMIT = 3.0
HUNG = 2  # the rank's last whole step


def run_of(composed: Compose, path: Path, *overrides: str) -> DictConfig:
    return composed(
        "precision=fp32", "parallel=sharded", "trainer.devices=2", "run.tokens=1024", "callbacks.monitor=null",
        f"callbacks.watchdog.seconds={LIMIT}", f"run.dir={path}", *overrides,
    )  # fmt: skip


def overslept(folder: Path, hung: Sequence[int] = (1,), *, keeps_lock: bool = False) -> None:
    """Ranks sleep, once they have said since when; some keep all their threads from running meanwhile."""
    if dist.get_rank() in hung:
        (folder / "since").write_text(repr(time.time()))
        if keeps_lock:
            ctypes.PyDLL(None).sleep(100)
        time.sleep(100)


def hang_in_a_step(config: DictConfig, **how: Any) -> None:
    steps, balance = 0, lightning_module.balance

    def patched(*arguments: Any) -> None:
        nonlocal steps
        steps += 1
        if steps > HUNG:
            overslept(Path(config.run.dir), **how)
        balance(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lightning_module, "balance", patched)
        fitted(config)


def hang_in_the_data(config: DictConfig) -> None:
    steps_of = SyntheticData.train_dataloader

    def patched(self: SyntheticData) -> Iterator[Step]:
        for number, step in enumerate(steps_of(self)):
            if number > HUNG:  # Lightning loads one ahead
                overslept(Path(config.run.dir))
            yield step

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SyntheticData, "train_dataloader", patched)
        fitted(config)


def ended(workers: Workers, function: Callable[[DictConfig], None], config: DictConfig) -> list[str]:
    """What each rank has written; all ended with status 1, soon after the limit."""
    with pytest.raises(RuntimeError, match="the process ended"):
        workers.run(function, config, ranks=2)
    folder = Path(config.run.dir)
    assert [process.exitcode for process in workers.processes[:2]] == [1, 1]
    reports = [folder / f"failure-rank{rank}.txt" for rank in range(2)]
    since = float((folder / "since").read_text())
    for report in reports:
        after = report.stat().st_mtime - since
        assert LIMIT - 0.5 <= after <= LIMIT + TO_WAIT + 2, "a rank looks every tenth of the limit"
    assert time.time() - since <= LIMIT + TO_WAIT + 5
    return [report.read_text() for report in reports]


def test_a_rank_that_hangs_in_a_step_is_named(composed: Compose, workers: Workers, tmp_path: Path) -> None:
    teller = Path(__file__).with_name("note_end.py")
    config = run_of(composed, tmp_path / "run", f"run.on_end=[{sys.executable},{teller},{tmp_path}/told]")
    waiting, hung = ended(workers, hang_in_a_step, config)
    assert (tmp_path / "told").read_text() == f"{tmp_path}/run failed\n", "by rank 0, which waited"
    line = f"has been in step 3 for over {LIMIT:g} s (callbacks.watchdog.seconds)"
    assert hung.startswith(f"rank 1 {line}\n")
    assert "in overslept\n    time.sleep(100)" in hung
    assert waiting.startswith(f"rank 0 {line}, waiting for other ranks\n")
    assert "torch/distributed" in waiting
    is_named(config, f"rank 1 {line}")


def is_named(config: DictConfig, line: str) -> None:
    """As why training failed, until it goes on."""
    folder = RunFolder(config.run.dir)
    assert folder.failure() == f"{line}; its stack is in failure-rank1.txt"
    prepare(config, folder)
    folder.release()
    assert not [path for pattern in ("failure*", ".failure*") for path in folder.path.glob(pattern)]


@pytest.mark.parametrize("hung", [(1,), pytest.param((0, 1), marks=pytest.mark.slow)])
def test_a_rank_none_of_whose_threads_can_run_is_named(
    composed: Compose, workers: Workers, tmp_path: Path, hung: Sequence[int]
) -> None:
    """By another rank, which waits for it; where all are so, by the program that started them."""
    config = run_of(composed, tmp_path / "run")
    if len(hung) == 2:
        with pytest.raises(RuntimeError, match="the process ended"):
            workers.run(partial(hang_in_a_step, hung=hung, keeps_lock=True), config, ranks=2)
        folder = RunFolder(config.run.dir)
        assert folder.failure() is None
        name_frozen(folder)
        assert (folder.failure() or "").startswith("rank 0 has been in step 3 ")
        return
    waiting, report = ended(workers, partial(hang_in_a_step, hung=hung, keeps_lock=True), config)
    line = (
        f"rank 1 has been in step 3 for over {LIMIT:g} s (callbacks.watchdog.seconds), where no thread of it could run"
    )
    assert report.startswith(f"{line}\n")
    assert "in overslept" in report
    assert "waiting for other ranks" in waiting.splitlines()[0]
    is_named(config, line)


@pytest.mark.slow
def test_a_rank_that_hangs_in_its_data_is_named(composed: Compose, workers: Workers, tmp_path: Path) -> None:
    waiting, hung = ended(workers, hang_in_the_data, run_of(composed, tmp_path / "run"))
    assert hung.startswith("rank 1 has been waiting for the data of step 3 ")
    assert "in overslept\n    time.sleep(100)" in hung
    assert waiting.startswith("rank 0 has been in step 3 ")


class Slow(lightning.Callback):
    """Works on rank 0 alone, for longer than the limit, where others wait in the next step."""

    phase = "evaluate"

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *arguments: Any) -> None:
        if dist.get_rank() == 0 and pl_module.steps == HUNG:
            time.sleep(2.5 * LIMIT)


@pytest.mark.slow
def test_long_work_of_a_callback_is_no_hang(composed: Compose, workers: Workers, tmp_path: Path) -> None:
    slow = "+callbacks.slow._target_=tests.distributed.test_watchdog.Slow"
    started = time.monotonic()
    assert workers.run(steps_and_threads, run_of(composed, tmp_path / "run", slow), ranks=2) == [(4, False)] * 2
    assert time.monotonic() - started > 2.5 * LIMIT
    assert not list((tmp_path / "run").glob("failure*"))


def steps_and_threads(config: DictConfig) -> tuple[int, bool]:
    """Steps trained, and whether the watchdog's thread has outlived them."""
    run = fitted(config)
    return run.module.steps, any(thread.name == "watchdog" for thread in threading.enumerate())


def test_one_process_is_not_watched(composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: set[str] = set()
    validate = Validate.on_train_batch_end

    def patched(self: Validate, *arguments: Any) -> None:
        names.update(thread.name for thread in threading.enumerate())
        validate(self, *arguments)

    monkeypatch.setattr(Validate, "on_train_batch_end", patched)
    config = run_of(composed, tmp_path / "run", "parallel=none", "trainer.devices=1")
    fitted(config).folder.release()
    assert names
    assert "watchdog" not in names


def test_the_watchdog_conforms() -> None:
    check_callback(lambda: Watchdog(seconds=10.0))
    check_callback(lambda: Watchdog(seconds=None))
    with pytest.raises(ValueError, match=r"callbacks\.watchdog\.seconds=0: must be above 0"):
        Watchdog(seconds=0)
