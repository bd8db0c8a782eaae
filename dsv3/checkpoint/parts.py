"""Files named by the tokens at their end: parts of tables, checkpoints."""

import re
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
    return sorted((path for path in folder.glob(pattern) if NUMBERED.fullmatch(path.name)), key=tokens_of)
