"""The lock by which one process at a time trains in a run folder, and others see whether one does."""

import contextlib
import fcntl  # filelock has no shared lock, by which readers without write access ask
import os
import socket
import time
from pathlib import Path
from typing import IO

LOCK = ".lock"
ATTEMPTS = 20
"""At a hundredth of a second each: whoever asks `is_held` has the lock for a moment."""


def hold(folder: Path) -> IO[str]:
    """Take the lock until the returned file is closed, or this process ends.

    Raises:
        BlockingIOError: another process has it.
    """
    lock = (folder / LOCK).open("a+")
    for attempt in range(ATTEMPTS):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if attempt == ATTEMPTS - 1:
                lock.close()
                raise
            time.sleep(0.01)
    lock.truncate(0)
    lock.write(socket.gethostname())
    lock.flush()
    return lock


def is_held(folder: Path) -> bool | None:
    """Whether a process has the lock now; None where this machine cannot tell: the last to have it was on another."""
    with contextlib.ExitStack() as stack:
        try:
            # Whoever made the folder may have put anything in its place: a pipe, or a link to another file.
            lock = os.open(folder / LOCK, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            stack.callback(os.close, lock)
            if os.read(lock, 256).decode() != socket.gethostname():
                return None
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except (OSError, UnicodeDecodeError):
            return None
        return False
