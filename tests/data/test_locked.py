"""Of processes that would prepare the same folder one does; one that is killed gives its place to the next."""

import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

HOLDER = """
import logging, sys, time
from pathlib import Path
from data.preparation import locked

logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
with locked(Path(sys.argv[1])):
    print("mine", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def start(folder: Path, seconds: float) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", HOLDER, str(folder), str(seconds)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_the_second_waits_and_takes_the_place_of_a_first_that_is_killed(tmp_path: Path) -> None:
    with start(tmp_path / "corpus", 100) as first:
        assert first.stdout is not None
        assert first.stdout.readline() == "mine\n"
        with start(tmp_path / "corpus", 0) as second:
            assert second.stdout is not None
            assert second.stdout.readline() == f"waiting for another process that prepares {tmp_path / 'corpus'}\n"
            first.kill()
            assert second.communicate()[0] == "mine\n"
    assert second.returncode == 0
