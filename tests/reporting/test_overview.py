"""The list of runs: state, progress, held-out text, the worst layer."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from dsv3.checkpoint.holding import LOCK, hold, is_held
from dsv3.checkpoint.run_folder import RunFolder
from dsv3.cli import main
from dsv3.reporting.history import History
from tests.conftest import ROOT
from tests.reporting.made_up import MadeUpRun

HOLDER = """
import sys, time
from pathlib import Path
from dsv3.checkpoint.holding import hold
lock = hold(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(100)
"""


@pytest.fixture
def made_up(tmp_path: Path) -> MadeUpRun:
    run = MadeUpRun(tmp_path / "runs" / "study" / "seed1", layers=3, experts=8)
    run.interval()
    return run


def state(run: MadeUpRun) -> str:
    return History(run.path, "run").state


def test_a_killed_run_is_called_stopped_at_once(made_up: MadeUpRun) -> None:
    assert state(made_up) == "training", "its parts are new, and no lock says more"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(made_up.path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    assert state(made_up) == "training"
    with pytest.raises(ValueError, match="another process is training there"):
        RunFolder(made_up.path).hold()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert state(made_up) == "stopped"


def test_a_run_of_another_machine_is_judged_by_its_newest_part(made_up: MadeUpRun) -> None:
    hold(made_up.path).close()
    assert state(made_up) == "stopped"
    (made_up.path / LOCK).write_text(f"not-{socket.gethostname()}")
    assert state(made_up) == "training"
    for part in [*made_up.path.rglob("part-*.parquet"), made_up.path / "config.yaml"]:
        os.utime(part, (0, 0))
    assert state(made_up) == "stopped"


def test_who_asks_keeps_no_run_from_beginning(tmp_path: Path) -> None:
    hold(tmp_path).close()
    for _ in range(200):
        assert is_held(tmp_path) is False
        hold(tmp_path).close()


@pytest.mark.parametrize("stranger", ["a pipe", "a link", "bytes"])
def test_what_a_stranger_put_in_place_of_the_lock_is_not_followed(tmp_path: Path, stranger: str) -> None:
    if stranger == "a pipe":
        os.mkfifo(tmp_path / LOCK)
    elif stranger == "a link":
        (tmp_path / "other").write_text(socket.gethostname())
        (tmp_path / LOCK).symlink_to(tmp_path / "other")
    else:
        (tmp_path / LOCK).write_bytes(b"\xff\xfe")
    assert is_held(tmp_path) is None


def test_every_run_is_listed(made_up: MadeUpRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def listed(*arguments: str) -> list[dict[str, object]]:
        capsys.readouterr()
        assert main(["runs", str(tmp_path / "runs"), "format=json", *arguments]) == 0
        return json.loads(capsys.readouterr().out)["runs"]  # type: ignore[no-any-return]

    empty = tmp_path / "runs" / "a long name that no table cuts, however many words it has, to the last of them"
    empty.mkdir()
    (empty / "config.yaml").write_text("{}")
    failed = RunFolder(tmp_path / "runs" / "failed")
    failed.path.mkdir()
    failed.config_path.write_text("{}")
    failed.write_failure(ValueError("the loss is [bold]not finite[/bold]"))

    begun, other, run = listed()
    assert (begun["state"], begun["tokens"], begun["bpb"], begun["worst_layer"]) == ("training", 0, None, None)
    assert (other["state"], other["why"]) == ("failed", "the loss is [bold]not finite[/bold]")
    newest = made_up.folder.read("metrics/validation")
    routing = made_up.folder.read("metrics/routing")
    worst = routing.loc[routing.max_vio_interval.idxmax()]
    assert run["bpb"] == newest[newest.domain == "all"].bpb.iloc[-1]
    assert (run["max_violation"], run["worst_layer"]) == (worst.max_vio_interval, worst.layer)
    left = 2_600_000 - made_up.tokens
    assert run["seconds_left"] == pytest.approx(left * 0.6 / (made_up.tokens / made_up.steps))
    assert listed("state=failed") == [other]

    assert main(["runs", str(tmp_path / "runs")]) == 0
    printed = capsys.readouterr().out
    assert empty.name in printed
    assert "failed failed: the loss is [bold]not finite[/bold]" in printed
    assert main(["runs", str(tmp_path / "runs"), "state=finished"]) == 0
    assert "no finished runs in" in capsys.readouterr().out
