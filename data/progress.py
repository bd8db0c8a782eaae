"""Progress of a preparation: a bar on a terminal, a line now and then elsewhere."""

import logging
import sys
import time
from typing import Any

log = logging.getLogger(__name__)

EVERY = 20.0
"""Seconds between lines where there is no terminal."""

SOON = 2.0
"""Seconds before anything is shown."""


class Progress:
    """Counts what is done of `total` (None: not known), in bytes or tokens."""

    def __init__(self, what: str, total: int | None, *, unit: str) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._done = 0
        self._started = time.monotonic()
        self._told = self._started + SOON - EVERY
        self._bar: Any = None

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def add(self, domain: str, count: int) -> None:
        self._done += count
        now = time.monotonic()
        if now - self._started < SOON:
            return
        if sys.stderr.isatty():
            self._show(domain)
        elif now - self._told >= EVERY:
            self._told = now
            log.info("%s %s: %s", self._what, domain, self._text(now))

    def _text(self, now: float) -> str:
        rate = self._done / (now - self._started)
        of_total = f" of {self._total / 1e6:,.0f}" if self._total else ""
        unit = "MB" if self._unit == "B" else "M tokens"
        return f"{self._done / 1e6:,.0f}{of_total} {unit}, {rate / 1e6:.1f} {unit}/s"

    def _show(self, domain: str) -> None:
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
            self._bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._bar.start()
            self._task = self._bar.add_task(self._what, total=self._total, text="")
        text = self._text(time.monotonic())
        self._bar.update(self._task, completed=self._done, description=f"{self._what} {domain}", text=text)
