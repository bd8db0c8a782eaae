"""A guest process, in a jail where there can be one: started, and ended with all that belongs to it."""

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3.sandbox.jail import Limits, command
from dsv3.sandbox.seccomp import seccomp_filter

LONGEST_END = 30.0
"""Seconds for the kernel to take back what a killed process held."""


class Confined:
    """A running guest. `end` leaves no process behind and waits until their memory is free."""

    def __init__(
        self,
        role: str,
        settings: Mapping[str, Any],
        limits: Limits,
        *,
        jailed: bool,
        stdin: int = subprocess.DEVNULL,
        stdout: int = subprocess.DEVNULL,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self._first: int | None = None
        fds: dict[str, int] = {}
        with contextlib.ExitStack() as stack:
            if jailed:
                told, fds["info-fd"] = os.pipe()
                stack.callback(os.close, fds["info-fd"])
            if jailed and (rules := seccomp_filter()):
                file = stack.enter_context(tempfile.TemporaryFile())
                file.write(rules)
                file.seek(0)
                fds["seccomp"] = file.fileno()
            self._process = subprocess.Popen(
                command(role, settings, limits, jailed=jailed, fds=fds),
                stdin=stdin,
                stdout=stdout,
                stderr=subprocess.DEVNULL,
                pass_fds=[*pass_fds, *fds.values()],
                start_new_session=True,
            )
        self._told = os.fdopen(told) if jailed else None

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def memory(self) -> int:
        """Bytes that a jail's processes hold, page tables included; 0 without a jail, or where there is none left."""
        first = self._first_process()
        if first is None:
            return 0
        with contextlib.suppress(OSError):
            others = Path(f"/proc/{first}/task/{first}/children").read_text().split()
            return sum(held_by(pid) for pid in (str(first), *others))
        return 0

    def end(self) -> None:
        with contextlib.ExitStack() as stack:
            waiting = []
            if first := self._first_process():
                with contextlib.suppress(OSError):
                    waiting = [os.pidfd_open(first)]
                    stack.callback(os.close, *waiting)
            if first != self._first_process():
                waiting = []  # it had ended before, and the number may be another's
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            if waiting:
                # A jail's first process ends last: after all others of its process namespace.
                select.select(waiting, [], [], LONGEST_END)
        self._process.wait()

    def _first_process(self) -> int | None:
        """The jail's first process, which ends with bubblewrap; None if it has."""
        if self._told is not None:
            with self._told, contextlib.suppress(ValueError, KeyError):
                self._first = int(json.loads(self._told.read())["child-pid"])
            self._told = None
        with contextlib.suppress(OSError):
            parent = Path(f"/proc/{self._first}/stat").read_text().rpartition(")")[2].split()[1]
            if int(parent) == self._process.pid:  # if not, the number was given to another process since
                return self._first
        return None


def held_by(pid: str) -> int:
    fields = re.findall(r"^Vm(?:RSS|PTE|Swap):\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    return 1024 * sum(map(int, fields))
