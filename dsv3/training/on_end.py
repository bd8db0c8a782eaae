"""Calls the user's own program when a run ends: `run.on_end`, a list of words, without a shell.

It gets two more words: the run's folder, and `finished`, `interrupted` or `failed`. The words come from conf/ or the
command line; what a run folder's config.yaml says of them is never read.
"""

import contextlib
import logging
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from omegaconf import DictConfig

from dsv3.runtime import OUT_OF_TIME, launched_rank

log = logging.getLogger(__name__)

State = Literal["finished", "interrupted", "failed"]

INTERRUPTED = (OUT_OF_TIME, 130, 143)
"""Exit statuses after which the same command goes on: time that is up, SIGINT, SIGTERM."""


@contextlib.contextmanager
def end_told(config: DictConfig) -> Iterator[None]:
    """Call `run.on_end` with how the block ends. Of several ranks the first does."""
    status: object = 1
    try:
        yield
        status = 0
    except KeyboardInterrupt:
        status = 130
        raise
    except SystemExit as end:
        status = end.code
        raise
    finally:
        if config.run.on_end and launched_rank() == 0:
            call(list(config.run.on_end), Path(config.run.dir).absolute(), state_of(status))


def state_of(status: object) -> State:
    """Of an exit status."""
    if status in (0, None):
        return "finished"
    return "interrupted" if status in INTERRUPTED else "failed"


def call(words: list[str], folder: Path, state: State) -> None:
    """Run the program to its end. Where it fails, a warning says so: the run has ended as it has."""
    try:
        status = subprocess.run([*words, str(folder), state], check=False).returncode
    except OSError as error:
        log.warning("run.on_end=%s: %s", words, error.strerror)
        return
    if status:
        log.warning("run.on_end=%s: ended with status %d", words, status)
