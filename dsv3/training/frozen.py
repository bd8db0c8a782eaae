"""Ends a process in which no thread can run Python, as one of them keeps the interpreter's lock (GIL).

A watchdog's thread cannot run there either. An alarm that was set before is raised without the lock (faulthandler):
the stacks of all threads are added to a hidden file of the run folder, and the process ends with status 1. The file
gets its name from another rank, or from what started the ranks.
"""

import contextlib
import faulthandler
import os
import sys
import threading
from pathlib import Path

from dsv3.checkpoint.run_folder import RunFolder, write_text_atomically

RAISED = "Timeout ("
"""What faulthandler begins with."""

WIDTH = 200
"""Bytes of the line before that: one that is written in a step takes the place of the last one's."""


class Alarm:
    """Of one rank. There is one in a process, as faulthandler has one timer."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = folder / f".failure-rank{rank}.tmp"
        self.file = self.path.open("w")
        self.file.seek(WIDTH)
        self.lock = threading.Lock()

    def set(self, seconds: float, line: str) -> None:
        """Raise it after so many seconds, unless it is set again or stopped. `line`: what the file begins with."""
        os.pwrite(self.file.fileno(), line.ljust(WIDTH).encode()[:WIDTH], 0)
        faulthandler.dump_traceback_later(seconds, exit=True, file=self.file)

    def stop(self) -> None:
        faulthandler.cancel_dump_traceback_later()

    def close(self) -> None:
        self.stop()
        self.file.close()
        self.path.unlink(missing_ok=True)


def name_frozen(folder: RunFolder) -> None:
    """Tell of the ranks whose alarm was raised: each has its file, and the first is why training failed."""
    for path in sorted(folder.path.glob(".failure-rank*.tmp")):
        text = path.read_text()
        line, raised, stacks = text[:WIDTH].rstrip(), text[WIDTH : WIDTH + len(RAISED)], text[WIDTH:]
        if raised != RAISED:
            continue
        named = path.with_name(f"{path.stem[1:]}.txt")
        with contextlib.suppress(FileNotFoundError):  # another rank was here first
            path.rename(named)
            write_text_atomically(named, f"{line}\n{stacks}")
            print(line, stacks, sep="\n", file=sys.stderr, flush=True)
            if folder.failure() is None:
                write_text_atomically(folder.failure_path, f"{line}; its stack is in {named.name}\n")
