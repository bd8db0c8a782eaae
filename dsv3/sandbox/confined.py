"""A guest process, in a jail where there can be one: started, and ended with all that belongs to it."""

import contextlib
import json
import os
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
        self._info = -1
        fds: dict[str, int] = {}
        with contextlib.ExitStack() as stack:
            if jailed:
                self._info, info = os.pipe()
                fds["info-fd"] = info
                stack.callback(os.close, info)
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

    @property
    def ended(self) -> bool:
        return self._process.poll() is not None

    def end(self) -> None:
        first = self._first_process()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        if first is not None:
            # A jail's first process ends last: after all others of its process namespace.
            select.select([first], [], [], LONGEST_END)
            os.close(first)
        self._process.wait()

    def _first_process(self) -> int | None:
        """A descriptor of the jail's first process, which bubblewrap's end takes with it; None if it is gone."""
        if self._info < 0:
            return None
        with os.fdopen(self._info) as file:
            self._info = -1
            try:
                pid = int(json.loads(file.read())["child-pid"])
                descriptor = os.pidfd_open(pid)
            except (ValueError, OSError):
                return None
        with contextlib.suppress(OSError):
            if int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == self._process.pid:
                return descriptor
        os.close(descriptor)  # the number was given to another process since
        return None
