"""Runs of a folder as the dashboard watches them: found again as they come and go, read only when they have changed."""

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dsv3.reporting.dashboard.read_ahead import ReadAhead
from dsv3.reporting.history import History, find_runs
from dsv3.reporting.overview import overview
from dsv3.reporting.routing_history import RoutingHistory
from dsv3.reporting.settings import settings_of
from dsv3.reporting.study_progress import study_folder

log = logging.getLogger(__name__)

SHARE = 50
"""Neither a search for runs nor one for what has changed is repeated before so many times the time that it took: at
most 2% of a core."""
MOST_STAMPS = 16
"""Sets of runs, one for each page that is open, of which it is known when they were last looked at."""


class Watched:
    """Histories by name. What was read of one is kept."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lock = threading.RLock()  # requests come in threads; tables are read by one of them at a time
        self._search = threading.Lock()  # which runs there are can be asked meanwhile
        self.ahead = ReadAhead(self.lock, lambda run: self.rows([run]))
        self._known: dict[str, History] = {}
        self._rows: dict[str, tuple[str, Mapping[str, Any]]] = {}
        self._next = 0.0
        self._stamps: dict[tuple[str, ...], tuple[float, str]] = {}

    def look(self) -> dict[str, History]:
        """Every run that is there, by name."""
        with self._search:
            if (started := time.monotonic()) >= self._next:
                found = {run.name: run for run in find_runs(self.root)}
                self._known = {name: self._known.get(name, run) for name, run in found.items()}
                self._next = again_after(started)
            return {name: run for name, run in self._known.items() if run.folder.config_path.exists()}

    def named(self, name: str) -> str | None:
        """The run of this name; where there is none, the one that began last."""
        return name if name in self.look() else self.newest()

    def newest(self) -> str | None:
        """The run that began last."""
        runs = self.look()
        return max(runs, key=lambda name: runs[name].began, default=None)

    def study(self, run: History) -> list[History]:
        """Every run of the study that this one belongs to; none where it belongs to no study."""
        folder, runs = study_folder(run), self.look().values()
        return [] if folder is None else [other for other in runs if folder in other.folder.path.parents]

    def routing(self, run: History) -> RoutingHistory:
        """Its routing; none where it cannot be read, which the parts that show it say."""
        with self.lock:
            try:
                return run.routing()
            except (ValueError, KeyError):  # no Parquet, or without the columns
                return RoutingHistory()

    def read(self, name: str) -> None:
        """Read the large tables of the run that `named` gives."""
        run = self.look().get(self.named(name) or "")
        if run is None:
            return
        reads: tuple[Callable[[History], object], ...] = (self.routing, History.train, History.validation)
        for read in reads:
            with self.lock, contextlib.suppress(Exception):  # the part that shows the table says what is wrong
                read(run)

    def rows(self, runs: Sequence[History], seconds: float = math.inf) -> dict[str, Mapping[str, Any]]:
        """Name -> `overview` of a run, made anew where that has changed.

        seconds: no more are read once these are over; runs that have no row yet are left out.
        """
        with self.lock:
            end = time.monotonic() + seconds
            for run in runs:
                if time.monotonic() > end:
                    break
                if self._rows.get(run.name, ("", {}))[0] != (now := stamp(run)):
                    self._rows[run.name] = now, row_of(run)
                    settings_of(run)  # kept: whoever shows a row shows these
            return {run.name: self._rows[run.name][1] for run in runs if run.name in self._rows}

    def stamp(self, runs: Sequence[History]) -> str:
        """Differs once anything of these runs that a page shows has changed, or was read for the first time."""
        names = tuple(run.name for run in runs)
        again, known = self._stamps.get(names, (0.0, ""))
        if (started := time.monotonic()) >= again:
            known = f"{hash(tuple(map(stamp, runs))):x}"
            self._stamps[names] = (again_after(started), known)
            if len(self._stamps) > MOST_STAMPS:
                del self._stamps[next(iter(self._stamps))]
        return f"{known} {sum(name in self._rows for name in names)}"


def again_after(started: float) -> float:
    """When a search that began then, and is over now, may be repeated."""
    now = time.monotonic()
    return now + SHARE * (now - started)


def row_of(run: History) -> Mapping[str, Any]:
    """Its `overview` and number of parameters; of a run whose files cannot be read, what is wrong."""
    try:
        row, counts = overview(run), run.info.get("parameters", {})
        done = row["tokens"] / row["planned"] if row["planned"] else None
        return {**row, "done": done, "parameters": counts.get("total"), "active": counts.get("active")}
    except Exception as error:  # a run folder may hold anything
        log.warning("%s: %s", run.name, error)
        return {"run": run.name, "state": run.state, "why": f"cannot be read: {error}"}


def stamp(run: History) -> str:
    """Differs once anything of the run that a page shows has changed: its state, or when its folders and files last
    did. A folder changes with each part that comes or goes."""
    folder = run.folder.path
    tables = [path for kind in ("metrics", "timing") for path in sorted((folder / kind).glob("*"))]
    files = [run.folder.config_path, run.folder.summary_path, folder / "run_info.json", folder / "spikes"]
    changed = [path.stat().st_mtime_ns for path in [*tables, *files] if path.exists()]
    return f"{run.state} {hash(tuple(changed)):x}"
