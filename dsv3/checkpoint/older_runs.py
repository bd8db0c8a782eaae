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


def table_parts(run: Path, name: str) -> list[Path]:
    """The parts of a table, e.g. `metrics/train`, in order; those under its older name too."""
    names = [name, TABLES[name]] if name in TABLES else [name]
    return sorted((part for each in names for part in numbered(run / each, "part-*.parquet")), key=tokens_of)


def read_part(part: Path) -> "pd.DataFrame":
    """The rows of one part of a table.

    Raises:
        ValueError: the file is damaged.
    """
    return read_parts([part])


def read_parts(parts: Sequence[Path]) -> "pd.DataFrame":
    """The rows of parts of one table, in order.

    Raises:
        ValueError: a file is damaged.
    """
    rows = arrow_rows(parts).to_pandas()
    return rows.rename(columns=COLUMNS.get(parts[0].parent.name, {}))


def arrow_rows(parts: Sequence[Path], columns: Sequence[str] | None = None) -> "pyarrow.Table":
    """Rows as Arrow has them, under the names in the files: a tenth of the time that pandas takes for each part.

    columns: what to read, of those that are there; None: all.

    Raises:
        ValueError: a file is damaged.
    """
    import pyarrow

    read = []
    for part in parts:
        with _opened(part) as file:
            kept = None if columns is None else list({*columns} & {*file.schema_arrow.names})
            read.append(file.read(columns=kept, use_threads=False))
    return pyarrow.concat_tables(read, promote_options="permissive")


@contextmanager
def _opened(part: Path) -> "Iterator[pyarrow.parquet.ParquetFile]":
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
                with _opened(part):
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
