"""Ctrl-C ends every command with one line and status 130, whatever a library makes of it."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
from omegaconf import DictConfig, OmegaConf

from dsv3.cli import user_errors
from dsv3.paths import ROOT
from dsv3.training.fit import fit
from hydra_plugins import study_sweeper


def ended(capsys: pytest.CaptureFixture[str], block: Callable[[], None]) -> tuple[Any, str]:
    """Exit status of the block as a command, and what stderr says."""
    with pytest.raises(SystemExit) as end, user_errors():
        block()
    return end.value.code, capsys.readouterr().err


def test_an_import_that_fails_after_ctrl_c_is_no_defect(capsys: pytest.CaptureFixture[str]) -> None:
    """As where a package tries an optional one, `except BaseException`, and then fails for want of it."""

    def block() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException:
            raise AttributeError("module 'numpy' has no attribute 'dtype'") from None

    assert ended(capsys, block) == (130, "interrupted\n")


def test_ctrl_c_that_a_library_forgets_comes_again(capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()

    def block() -> None:
        with contextlib.suppress(BaseException):
            signal.raise_signal(signal.SIGINT)
        time.sleep(30)

    assert ended(capsys, block) == (130, "interrupted\n")
    assert time.monotonic() - began < 15


def test_clean_up_after_ctrl_c_is_not_disturbed(capsys: pytest.CaptureFixture[str]) -> None:
    done = []

    def block() -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            time.sleep(0.3)
            done.append(True)

    assert ended(capsys, block) == (130, "interrupted\n")
    assert done == [True]
    time.sleep(0.2)  # nothing comes again once the command has ended


@pytest.mark.parametrize("module", ["dsv3", "data"])
def test_ctrl_c_before_the_command_line_is_imported(module: str) -> None:
    code = (
        "import os, signal, sys, runpy\n"
        "class Finder:\n"
        "    def find_spec(name, *_):\n"
        "        if name == 'dsv3.cli': os.kill(os.getpid(), signal.SIGINT)\n"
        f"sys.meta_path.insert(0, Finder); runpy.run_module({module!r}, run_name='__main__')"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")


class Twice(lightning.Callback):
    """Ctrl-C in a step, and again before it ends."""

    def on_train_batch_start(self, *arguments: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)


def test_a_second_ctrl_c_in_training_is_no_failure_of_the_run(
    composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        fit(composed(f"run.dir={tmp_path}/run", f"+callbacks.twice._target_={__name__}.Twice"))


def test_ctrl_c_while_the_report_of_a_study_is_drawn(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sweeper = study_sweeper.StudySweeper.__new__(study_sweeper.StudySweeper)
    sweeper.config, sweeper.study = OmegaConf.create({"study": {"arms": {"a": []}}}), Path("study")

    def drawn(*arguments: Any) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except BaseException:
            raise RuntimeError("no plot") from None

    monkeypatch.setattr(study_sweeper, "report_of_ended", drawn)
    monkeypatch.setattr(study_sweeper, "share_imports", lambda config: None)
    monkeypatch.setattr(study_sweeper.BasicSweeper, "sweep", lambda self, arguments: [])
    with pytest.raises(SystemExit) as end:
        sweeper.sweep([])
    assert end.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"
