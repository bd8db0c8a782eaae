"""A run is a folder, `runs/<experiment>/<name>/`:

    config.yaml         the resolved config             tokenizer/      what encodes and decodes its text
    checkpoints/        tokens-000001000000.ckpt        metrics/<table>/part-000001000000.parquet
    summary.json, report.html  written at the end       timing/<table>/...   wall-clock measurements
    failure.txt         why training failed, until it is resumed
    run_info.json       sizes, FLOPs per token          spikes/         batches logged by the guard

Tables are columnar, one part per interval (of checkpoints or of monitoring), named by the tokens at its end: a resumed
run drops the parts past its checkpoint, so that its tables equal those of an uninterrupted run.
"""

import fcntl
import json
import logging
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import DictConfig, OmegaConf

from dsv3.checkpoint.older_runs import read_part, table_parts, upgraded_summary
from dsv3.config.moved import upgraded

log = logging.getLogger(__name__)


def write_atomically(path: Path, write: Any) -> None:
    """Call `write(temporary_path)`, flush it to disk and rename it to `path`: a reader sees the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


class Table:
    """Rows kept in memory until `flush` writes them as one Parquet part."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: list[Mapping[str, Any]] = []

    def append(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)

    def flush(self, tokens: int) -> None:
        """Write the rows so far as the part that ends at `tokens`."""
        if self.rows:
            frame = pd.DataFrame(self.rows)
            part = self.folder / f"part-{tokens:015d}.parquet"
            write_atomically(part, lambda path: frame.to_parquet(path, engine="pyarrow", index=False))
            self.rows = []

    def drop_after(self, tokens: int) -> None:
        """Delete the parts that end past `tokens`."""
        for part in self.folder.glob("part-*.parquet"):
            if tokens_of(part) > tokens:
                part.unlink()


def tokens_of(path: Path) -> int:
    """The number in `part-000000001024.parquet` or `tokens-000000001024.ckpt`."""
    return int(path.name.split("-")[1].split(".")[0])


class RunFolder:
    """Paths, tables and checkpoints of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        self.config_path = self.path / "config.yaml"
        self.summary_path = self.path / "summary.json"
        self.failure_path = self.path / "failure.txt"
        self.tokenizer_path = self.path / "tokenizer"
        self.tables: dict[str, Table] = {}

    def config(self) -> DictConfig:
        """The run's config.yaml; keys and values of older versions under their names of today."""
        config = OmegaConf.load(self.config_path)
        assert isinstance(config, DictConfig)
        return upgraded(config)

    def table(self, name: str) -> Table:
        """The table that rows are added to, e.g. `metrics/train`."""
        return self.tables.setdefault(name, Table(self.path / name))

    def flush(self, tokens: int) -> None:
        """Write the rows of all tables, up to `tokens`; `metrics/train` last: it tells how far a run is."""
        for name in sorted(self.tables, key=lambda name: name == "metrics/train"):
            self.tables[name].flush(tokens)

    def read(self, name: str) -> pd.DataFrame:
        """All parts of a table in order, e.g. `metrics/train`; empty if there are none."""
        parts = table_parts(self.path, name)
        return pd.concat([read_part(part) for part in parts], ignore_index=True) if parts else pd.DataFrame()

    def drop_after(self, tokens: int) -> None:
        """Delete metrics, timing and checkpoints past a checkpoint."""
        for folder in [*self.path.glob("metrics/*"), *self.path.glob("timing/*")]:
            Table(folder).drop_after(tokens)
        for checkpoint in self.checkpoints():
            if tokens_of(checkpoint) > tokens:
                checkpoint.unlink()

    def checkpoint_path(self, tokens: int) -> Path:
        return self.path / "checkpoints" / f"tokens-{tokens:015d}.ckpt"

    def checkpoints(self) -> list[Path]:
        """All of them, oldest first."""
        return sorted((self.path / "checkpoints").glob("tokens-*.ckpt"))

    def begun(self) -> bool:
        """Whether a run could lose anything: a checkpoint or a table."""
        return bool(self.checkpoints()) or next(self.path.glob("*/*/part-*.parquet"), None) is not None

    def newest_valid_checkpoint(self) -> Path | None:
        """The newest checkpoint whose checksums hold; corrupt ones are skipped with a warning."""
        for path in reversed(self.checkpoints()):
            if is_valid(path):
                return path
            log.warning("%s is corrupt; trying an older checkpoint", path)
        return None

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        text = json.dumps(summary, indent=2) + "\n"
        write_atomically(self.summary_path, lambda path: path.write_text(text))

    def summary(self) -> dict[str, Any] | None:
        return upgraded_summary(json.loads(self.summary_path.read_text())) if self.summary_path.exists() else None

    def write_failure(self, error: Exception) -> None:
        text = f"{error or type(error).__name__}\n"
        write_atomically(self.failure_path, lambda path: path.write_text(text))

    def failure(self) -> str | None:
        """Why training ended with an error; None where it did not."""
        return self.failure_path.read_text().strip() if self.failure_path.exists() else None

    def hold(self) -> None:
        """Keep other processes from training in this folder until this one ends.

        Raises:
            ValueError: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"run.dir={self.path}: another process is training there") from None

    def release(self) -> None:
        """Let other runs have the folder, this process's own among them."""
        self._lock.close()

    def move_aside(self) -> Path:
        """Rename the folder to the first free `<name>.old-<n>`, so that a new run can begin."""
        n = 1
        while (target := self.path.with_name(f"{self.path.name}.old-{n}")).exists():
            n += 1
        return self.path.rename(target)


def is_valid(checkpoint: Path) -> bool:
    """Whether the file is a complete zip archive with correct checksums."""
    try:
        with zipfile.ZipFile(checkpoint) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, OSError):
        return False


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Tensors and plain containers only; nothing in the file is executed."""
    return torch.load(path, map_location="cpu", weights_only=True)


def find_run(checkpoint: str | Path) -> tuple[RunFolder, Path]:
    """The run folder and the checkpoint file that a user names by either of them.

    Raises:
        FileNotFoundError: there is no such path, no valid checkpoint, or no config.yaml.
    """
    path = Path(checkpoint)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint={checkpoint}: there is no such file or folder")
    folder = RunFolder(path if path.is_dir() else path.absolute().parent.parent)
    file = folder.newest_valid_checkpoint() if path.is_dir() else path
    if file is None:
        raise FileNotFoundError(f"checkpoint={checkpoint}: no valid checkpoints/tokens-*.ckpt in this folder")
    if not folder.config_path.exists():
        raise FileNotFoundError(f"checkpoint={checkpoint}: {folder.config_path} is missing")
    return folder, file
