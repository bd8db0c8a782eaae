"""Files named by the tokens at their end: parts of tables, checkpoints."""

import os
import re
from fnmatch import fnmatchcase
from pathlib import Path

NUMBERED = re.compile(r"(?:part|tokens)-(\d+)\.(?:parquet|ckpt)")


def tokens_of(path: Path) -> int:
    """The number in `part-000000001024.parquet` or `tokens-000000001024.ckpt`.

    Raises:
        ValueError: the file has no such name.
    """
    match = NUMBERED.fullmatch(path.name)
    if match is None:
        raise ValueError(f"{path}: a checkpoint is called tokens-<number>.ckpt")
    return int(match[1])


def is_run(path: Path) -> bool:
    """Whether this is a folder other than a checkpoint's: a run's, that is to say."""
    return path.is_dir() and NUMBERED.fullmatch(path.name) is None


def numbered(folder: Path, pattern: str) -> list[Path]:
    """Parts or checkpoints of a folder in order; files that someone else put there are left out."""
    try:
        names = os.listdir(folder)  # a folder may hold thousands: Path.glob takes ten times as long
    except OSError:
        return []
    found = [(int(match[1]), name) for name in names if (match := NUMBERED.fullmatch(name))]
    return [folder / name for _, name in sorted(found) if fnmatchcase(name, pattern)]
