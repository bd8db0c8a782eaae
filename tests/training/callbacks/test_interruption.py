"""`trainer.max_time` ends a run as an interruption does, and the same command goes on, bit for bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
from omegaconf import DictConfig

from dsv3.bounds import seconds_of
from dsv3.training.callbacks.interruption import Interruption
from dsv3.training.fit import fit
from dsv3.training.summary import conclude
from tests.smoke.test_resume import assert_same_run

Compose = Callable[..., DictConfig]
STEP = 256  # tokens of a step of the synthetic data


class LateInStep(Interruption):
    """`max_time` is over in the third step of each process, where a clock would end it somewhere else each time."""

    steps = 0

    def on_train_batch_start(self, *arguments: Any) -> None:
        self.steps += 1
        if self.steps == 3:
            assert self.max_seconds == 3600
            self.began -= 3600


class NeverLate(lightning.Callback):
    """`max_time` is not what Lightning ends training by."""

    def on_train_start(self, trainer: Any, *arguments: Any) -> None:
        assert not any(isinstance(each, lightning.pytorch.callbacks.Timer) for each in trainer.callbacks)


@pytest.mark.slow
def test_out_of_time_three_times_equals_uninterrupted(
    composed: Compose, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    length = (f"run.tokens={11 * STEP}", f"run.validate_every_tokens={4 * STEP}", "callbacks.monitor.every_tokens=512")
    fit(composed(*length, f"run.dir={tmp_path}/whole")).folder.release()
    late = (f"callbacks.interruption._target_={__name__}.LateInStep", "trainer.max_time=00:01:00:00")
    for stop in (1, 2, 3):
        run = fit(composed(*length, f"run.dir={tmp_path}/limited", *late))
        assert run.exit_status == 75
        assert run.module.steps == 3 * stop
        conclude(run)
        newest = run.folder.checkpoints()[-1]
        assert f"Out of time. Rerun the same command to resume from {newest}" in capsys.readouterr().err
        assert run.folder.summary() is None
        run.folder.release()
    last = fit(composed(*length, f"run.dir={tmp_path}/limited"))
    assert last.exit_status == 0
    last.folder.release()
    assert_same_run(tmp_path / "whole", tmp_path / "limited")


def test_a_limit_that_is_over_in_the_last_step_changes_nothing(composed: Compose, tmp_path: Path) -> None:
    late = (f"callbacks.interruption._target_={__name__}.LateInStep", "trainer.max_time=00:01:00:00")
    bystander = f"+callbacks.bystander._target_={__name__}.NeverLate"
    run = fit(composed(f"run.tokens={3 * STEP}", f"run.dir={tmp_path}/run", *late, bystander))
    run.folder.release()
    assert run.exit_status == 0
    scores = run.folder.read("metrics/validation")
    assert scores.tokens.max() == 3 * STEP


def test_a_rollback_does_not_set_the_clock_back(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsv3.training import fit as module
    from dsv3.training.callbacks.guard import RollBack

    class Run:
        def __init__(self) -> None:
            self.interruption = Interruption(max_time=None)
            self.trainer, self.module, self.data, self.resume_from, self.folder = self, None, None, None, self

        def fit(self, *arguments: Any, **settings: Any) -> None:
            runs.append(self)
            if len(runs) == 1:
                raise RollBack("a spike")

        def release(self) -> None:
            pass

    runs: list[Run] = []
    monkeypatch.setattr(module, "build_run", lambda config: Run())
    module.fit(composed())
    first, second = runs
    assert first.interruption.began == second.interruption.began


@pytest.mark.parametrize(
    ("text", "seconds"), [("00:00:00:01", 1), ("01:02:03:04", 93_784), ("123:00:00:00", 10_627_200)]
)
def test_a_limit_is_read(text: str, seconds: int) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "00:00:00:00", "1:2:3:4", "01:00:00", "-1:00:00:00", "1e9"])
def test_what_is_no_limit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"must be DD:HH:MM:SS above zero, such as 00:03:50:00"):
        seconds_of(text)
    with pytest.raises(ValueError, match=r"trainer\.max_time="):
        Interruption(max_time=text)
