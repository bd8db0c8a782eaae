"""`run.on_end` is told how a run ended, whatever ended it, and never comes from a run folder."""

import contextlib
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from dsv3.training.callbacks.interruption import leave
from dsv3.training.fit import fit
from dsv3.training.on_end import end_told
from tests.conftest import ROOT

sys.path.insert(0, str(ROOT))  # where train.py lies

Compose = Callable[..., DictConfig]
TELLER = "import pathlib, sys; pathlib.Path(sys.argv[1]).write_text('|'.join(sys.argv[2:]))"


def told(config: DictConfig, folder: Path, end: BaseException | None) -> str:
    config.run.on_end = [sys.executable, "-c", TELLER, str(folder / "told"), "$HOME; touch x"]
    with pytest.raises(type(end)) if end else contextlib.nullcontext(), end_told(config):
        if end is not None:
            raise end
    return (folder / "told").read_text()


@pytest.mark.parametrize(
    ("end", "state"),
    [
        (None, "finished"),
        (SystemExit(75), "interrupted"),
        (SystemExit(130), "interrupted"),
        (KeyboardInterrupt(), "interrupted"),
        (SystemExit(1), "failed"),
        (ValueError("no"), "failed"),
        (MemoryError(), "failed"),
    ],
    ids=repr,
)
def test_it_gets_the_folder_and_the_state_and_no_shell(
    composed: Compose, tmp_path: Path, end: BaseException | None, state: str
) -> None:
    config = composed(f"run.dir={tmp_path}/the run")
    assert told(config, tmp_path, end) == f"$HOME; touch x|{tmp_path}/the run|{state}"


def test_a_program_that_fails_changes_nothing(composed: Compose, caplog: pytest.LogCaptureFixture) -> None:
    config = composed()
    for words, warning in ((["false"], "ended with status 1"), (["/no/such"], "No such file")):
        config.run.on_end = words
        with end_told(config):
            pass
        assert warning in caplog.messages[-1]


def test_only_the_first_rank_calls_it(composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(FileNotFoundError):
        told(composed(), tmp_path, None)


def test_what_a_run_folder_says_is_not_called(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train

    folder = tmp_path / "run"
    monkeypatch.chdir(tmp_path)  # the programs take the run's folder and state for names of files
    keys = (f"run.dir={folder}", "trainer.max_steps=1", "callbacks.monitor=null")
    fit(composed(*keys)).folder.release()
    config = OmegaConf.load(folder / "config.yaml")
    config.run.on_end = ["touch", str(tmp_path / "called")]
    OmegaConf.save(config, folder / "config.yaml")
    train.train(composed(*keys, f"run.on_end=[touch, {tmp_path}/own]"))
    assert (tmp_path / "own").exists()
    assert not (tmp_path / "called").exists()


def test_sigusr1_before_the_first_step_asks_for_the_same_command_again(composed: Compose, tmp_path: Path) -> None:
    signal.signal(signal.SIGUSR1, leave)
    with pytest.raises(SystemExit) as end:
        signal.raise_signal(signal.SIGUSR1)
    assert end.value.code == 75
