"""Reads what the next click may ask for while nobody waits for an answer: a table of a long run is hundreds of files."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

from dsv3.reporting.experts import unchanged
from dsv3.reporting.history import History
from dsv3.reporting.overlay import worst_violation

Read: TypeAlias = Callable[[History], object]
OF_ALL: tuple[Read, ...] = (lambda run: run.table("timing/train"), History.train, History.validation, worst_violation)
"""What the curves of several runs are drawn from, a table each."""
OF_SHOWN: tuple[Read, ...] = (History.tables_by_role, unchanged)
"""What else the views of one run show."""
QUIET_SECONDS = 0.5
"""Without a question, before a table is read."""
MOST_RUNS = 16
"""That are read ahead, those that began last: a folder may hold thousands."""


class ReadAhead:
    """A thread that reads each table once, and ends; what is added to a table later is read when it is asked for."""

    def __init__(self, lock: threading.RLock) -> None:
        """lock: by whom it is held, tables are read."""
        self.lock = lock
        self._done: set[tuple[str, Read]] = set()
        self._thread: threading.Thread | None = None
        self._asked = 0.0

    def asked(self, runs: Mapping[str, History], shown: str) -> None:
        """Someone asked for something of a run just now, of all runs that there are."""
        self._asked = time.monotonic()
        if self._thread is None or not self._thread.is_alive():
            jobs = list(self._left(runs, shown))
            if jobs:
                self._thread = threading.Thread(target=self._work, args=(jobs,), daemon=True)
                self._thread.start()

    def _left(self, runs: Mapping[str, History], shown: str) -> Iterator[tuple[History, Read]]:
        """What has not been read, of the run that is shown before all."""
        latest = sorted(runs, key=lambda name: (name != shown, -runs[name].began))[:MOST_RUNS]
        jobs = [(name, read) for name in latest for read in ((*OF_SHOWN, *OF_ALL) if name == shown else OF_ALL)]
        yield from ((runs[name], read) for name, read in jobs if (name, read) not in self._done)

    def _work(self, jobs: list[tuple[History, Read]]) -> None:
        for run, read in jobs:
            while (left := self._asked + QUIET_SECONDS - time.monotonic()) > 0:
                time.sleep(left)
            with self.lock, contextlib.suppress(Exception):  # the plot that shows the table says what is wrong
                read(run)
            self._done.add((run.name, read))
