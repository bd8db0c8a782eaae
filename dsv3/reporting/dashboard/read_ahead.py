"""Reads what the next click may ask for while nobody waits: a table of a long run is hundreds of files."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import product

from dsv3.reporting.experts import coactivation, unchanged
from dsv3.reporting.health import chosen_layer
from dsv3.reporting.history import History
from dsv3.reporting.overlay import worst_violation

QUIET_SECONDS = 0.5
"""Without a question, before a table is read."""
MOST_RUNS = 16
"""Whose tables are read ahead, those that began last: a folder may hold thousands."""
MOST_BYTES = 32e6
"""Of a run's routing on disk, which takes several times as much memory."""


def small_routing(run: History, *, most_new: int | None = None) -> object:
    parts = run.parts("metrics/routing")
    return run.routing(most_new=most_new) if parts and len(parts) * parts[-1].stat().st_size < MOST_BYTES else None


def small_coactivation(run: History) -> object:
    return coactivation(run, chosen_layer(run, None)) if small_routing(run) is not None else None


READS: tuple[Callable[[History], object], ...] = (
    lambda run: run.table("timing/train"), History.train, History.validation, History.tables_by_role, unchanged,
    worst_violation, *[partial(small_routing, most_new=128)] * 3, small_routing, small_coactivation,
)  # fmt: skip
"""What the views show of a run, each a tenth of a second for a long one: who asks meanwhile waits for one of them."""


class ReadAhead:
    """A thread that ends when all is read. Of each run it reads a table once; what is added to it later is read when it
    is asked for."""

    def __init__(self, lock: threading.RLock, row: Callable[[History], object]) -> None:
        """lock: by whom it is held, tables are read. row: reads what the table of all runs shows of one."""
        self.lock = lock
        self._reads = (row, *READS)
        self._done: set[tuple[str, int]] = set()
        self._thread: threading.Thread | None = None
        self._asked = 0.0

    def pause(self) -> None:
        """Someone asks for something: no table is begun before they have their answer and the screen is drawn."""
        self._asked = time.monotonic()

    def asked(self, runs: Mapping[str, History], shown: str) -> None:
        """Someone has been answered about a run, of all runs that there are."""
        if not self._works and (jobs := list(self._left(runs, shown))):
            self.begin(partial(self._work, jobs))

    @property
    def _works(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def begin(self, work: Callable[[], None]) -> None:
        """Do this in the thread, unless that has something to do."""
        if not self._works:
            self._thread = threading.Thread(target=work, daemon=True)
            self._thread.start()

    def _left(self, runs: Mapping[str, History], shown: str) -> Iterator[tuple[History, int]]:
        """What has not been read, as numbers of `_reads`: first all of the run that is shown, then a row of each."""
        latest = sorted(runs, key=lambda name: (name != shown, -runs[name].began))
        read, tables = latest[:MOST_RUNS], range(1, len(self._reads))
        jobs = [*product(read[:1], tables), *product(latest, [0]), *product(read[1:], tables)]
        yield from ((runs[name], number) for name, number in jobs if (name, number) not in self._done)

    def _work(self, jobs: list[tuple[History, int]]) -> None:
        for run, number in jobs:
            while (left := self._asked + QUIET_SECONDS - time.monotonic()) > 0:
                time.sleep(left)
            with self.lock, contextlib.suppress(Exception):  # the plot that shows the table says what is wrong
                self._reads[number](run)
            self._done.add((run.name, number))
