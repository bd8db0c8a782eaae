"""train.py, evaluate.py and `python -m dsv3` as processes of their own.

A Python that imports what they import needs six seconds before it begins; a tiny run is over in three. So `start` forks
the process from one that has imported all of it (tests/preloaded.py, by multiprocessing's fork server) and runs the
script there from its first line, as __main__: arguments, working directory, output, signals and exit status are those
of a process. What a fork shares with its siblings is the seed of hash(), so a comparison between two commands takes
one of them from a new interpreter: `call_python`.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from dsv3.paths import ROOT

FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["tests.preloaded"])


class Command:
    """A command that runs in a forked process. Its output goes to files: nothing has to read it meanwhile."""

    def __init__(self, command: Sequence[str], folder: Path) -> None:
        self.output = tempfile.TemporaryDirectory()
        self.process = FORKED.Process(target=_run, args=(list(command), str(folder), self.output.name))
        self.process.start()

    @property
    def returncode(self) -> int | None:
        """As of subprocess.Popen: None while it runs, minus the number of the signal that killed it."""
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()

    def communicate(self, timeout: float = 250) -> tuple[str, str]:
        """Wait for its end; what it wrote to stdout and stderr."""
        self.process.join(timeout)
        if self.returncode is None:
            self.kill()
            raise TimeoutError(f"still running after {timeout} s:\n{self.read('stderr')}")
        return self.read("stdout"), self.read("stderr")

    def read(self, stream: str) -> str:
        return Path(self.output.name, stream).read_text()


def start(folder: Path, *command: str) -> Command:
    """Start a command in `folder`: what follows `python`, a script of the project or `-m dsv3`, and arguments."""
    return Command(command, folder)


def attempt(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, whatever its exit status."""
    running = start(folder, *command)
    output, errors = running.communicate()
    assert running.returncode is not None
    return subprocess.CompletedProcess(command, running.returncode, output, errors)


def call(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command that succeeds."""
    done = attempt(folder, *command)
    assert done.returncode == 0, done.stderr
    return done


def call_python(folder: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script that succeeds by an interpreter that is started for it, as from a shell."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / script), *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    return done


def _run(command: list[str], folder: str, output: str) -> None:
    """In the forked process: become what `python *command` would be."""
    from tests.preloaded import PATH

    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        file = os.open(Path(output, name), os.O_WRONLY | os.O_CREAT)
        os.dup2(file, descriptor)
        os.close(file)
    os.chdir(folder)
    first, *rest = command
    if first == "-m":
        module, *sys.argv[1:] = rest
        sys.path[:] = ["", *PATH]
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = [str(ROOT / first), *rest]
        sys.path[:] = [str(ROOT), *PATH]
        runpy.run_path(sys.argv[0], run_name="__main__")
