"""Run folders of older versions, read by today's names: tables, columns, files, keys of JSON."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3.checkpoint.parts import numbered, tokens_of

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow

TABLES = {"metrics/alerts": "metrics/findings"}
COLUMNS = {
    "routing": {
        "violation_micro": "max_vio_micro",
        "violation_step": "max_vio_step",
        "violation_interval": "max_vio_interval",
        "limited": "group_limited_fraction",
    },
    "stability": {"kept": "unchanged_fraction"},
}
FILES = {"run_info.json": "facts.json", "spikes/skipped_updates.json": "spikes/left_out.json"}
SCORE_KEYS = {"baseline": "majority_correct", "lead_in_standard_errors": "z_score"}


def table_names(name: str) -> list[str]:
    """The names of a table, e.g. `metrics/train`: today's and its older one."""
    return [name, TABLES[name]] if name in TABLES else [name]


def table_parts(run: Path, name: str) -> list[Path]:
    """The parts of a table in order; those under its older name too."""
    found = [numbered(run / each, "part-*.parquet") for each in table_names(name)]
    return found[0] if len(found) == 1 else sorted((part for parts in found for part in parts), key=tokens_of)


def read_part(part: Path, columns: Sequence[str] = ()) -> "pd.DataFrame":
    """The rows of one part of a table; see `read_parts`."""
    return read_parts([part], columns)


def read_parts(parts: Sequence[Path], columns: Sequence[str] = ()) -> "pd.DataFrame":
    """The rows of parts of one table, in order. columns: see `arrow_rows`.

    Raises:
        ValueError: a file is damaged.
    """
    return arrow_rows(parts, columns).to_pandas()


def arrow_rows(parts: Sequence[Path], columns: Sequence[str] = ()) -> "pyarrow.Table":
    """Rows as Arrow has them, under today's names: a tenth of the time that pandas takes for each part.

    columns: what to read, by today's names, of those that are there; none: all.

    Raises:
        ValueError: a file is damaged.
    """
    import pyarrow

    older = COLUMNS.get(parts[0].parent.name, {})
    wanted = [*columns, *(name for name, today in older.items() if today in columns)]
    read = []
    for part in parts:
        with opened(part) as file:  # leaves out names that it has not
            rows = file.read(columns=wanted or None, use_threads=False)
        read.append(rows.rename_columns([older.get(name, name) for name in rows.column_names]) if older else rows)
    return pyarrow.concat_tables(read, promote_options="permissive")


def last_of(part: Path, value: str, *, where: str, column: str) -> "pyarrow.Scalar":
    """`column` in the last row in which `where` is `value`. Reads no other rows than those of one group with it.

    Raises:
        ValueError: the file is damaged. KeyError: there is no such row.
    """
    with opened(part) as file:
        for group in reversed(range(file.num_row_groups)):
            values = file.read_row_group(group, columns=[where], use_threads=False)[where].to_pylist()
            if value in values:
                at = len(values) - 1 - values[::-1].index(value)
                return file.read_row_group(group, columns=[column], use_threads=False)[column][at]
    raise KeyError(value)


def columns_of(part: Path) -> list[str]:
    """Names of a part's columns, of which nothing else is read.

    Raises:
        ValueError: the file is damaged.
    """
    with opened(part) as file:
        return [COLUMNS.get(part.parent.name, {}).get(name, name) for name in file.schema_arrow.names]


@contextmanager
def opened(part: Path) -> Iterator["pyarrow.parquet.ParquetFile"]:
    """A part to read from.

    Raises:
        ValueError: the file is damaged.
    """
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(part) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        what = " ".join(str(error).split())[:200]
        raise ValueError(f"{part} cannot be read as Parquet ({what}); delete it to go on without its rows") from None


def refuse_damaged_parts(run: Path, tokens: int) -> None:
    """Open every part of every table that ends at `tokens` or before, so that no training ends in a damaged one.

    Raises:
        ValueError: a file is damaged.
    """
    for folder in sorted([*run.glob("metrics/*"), *run.glob("timing/*")]):
        for part in numbered(folder, "part-*.parquet"):
            if tokens_of(part) <= tokens:
                with opened(part):
                    pass


def file_to_read(run: Path, name: str) -> Path:
    """Where a file of `FILES` is; its path of today where there is neither."""
    today, older = run / name, run / FILES[name]
    return older if older.exists() and not today.exists() else today


def upgraded_summary(summary: dict[str, Any]) -> dict[str, Any]:
    """A summary.json with today's keys; the first versions named their two samples."""
    questions = {
        family: {SCORE_KEYS.get(key, key): value for key, value in score.items()}
        for family, score in summary.get("questions", {}).items()
    }
    samples = [{"name": name, **summary[name]} for name in ("completion", "infilling") if name in summary]
    return {"samples": samples} | summary | ({"questions": questions} if "questions" in summary else {})
