"""List runs: state, progress, held-out bits per byte, the worst-balanced layer."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.cli import option

FIRST = "folder"

WIDE = 200
"""Columns of a table that is written to a file: no name is cut."""


@dataclass
class Options:
    folder: str = option("runs", "the folder with the runs, however deep they lie in it")
    state: str | None = option(
        None, "only runs in this state; null: all", choices=("finished", "failed", "training", "stopped")
    )


def run(options: Options) -> dict[str, Any]:
    """Print a table with a row for each run.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    from rich.console import Console
    from rich.table import Table

    from dsv3.reporting.history import find_runs
    from dsv3.reporting.overview import overview

    rows = [overview(run) for run in find_runs(Path(options.folder))]
    rows = [row for row in rows if options.state in (None, row["state"])]
    table = Table(box=None, header_style="bold")
    for heading in ("run", "state", "tokens", "done", "left", "bits/byte", "MaxVio", "in layer"):
        table.add_column(heading, justify="left" if heading in ("run", "state", "in layer") else "right", no_wrap=True)
    for row in rows:
        table.add_row(*cells(row))
    console = Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else WIDE)
    if rows:
        console.print(table)
    else:
        console.print(f"no {'' if options.state is None else options.state + ' '}runs in {options.folder}")
    for row in rows:
        if row["why"]:
            console.print(f"{row['run']} failed: {row['why'].splitlines()[0]}")
    return {"runs": [dict(row) for row in rows]}


def cells(row: Any) -> list[str]:
    """A row as text; what a run has no figure of is left empty."""
    from dsv3.reporting.amounts import text_of_seconds

    planned, left = row["planned"], row["seconds_left"]
    return [
        row["run"],
        row["state"],
        f"{row['tokens']:,}",
        f"{row['tokens'] / planned:.0%}" if planned else "",
        "" if left is None else text_of_seconds(left),
        "" if row["bpb"] is None else f"{row['bpb']:.4f}",
        "" if row["max_violation"] is None else f"{row['max_violation']:.2f}",
        row["worst_layer"] or "",
    ]
