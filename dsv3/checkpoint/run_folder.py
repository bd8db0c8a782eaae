"""A run is a folder, `runs/<experiment>/<name>/`:

    config.yaml         the resolved config             tokenizer/      what encodes and decodes its text
    checkpoints/        tokens-000001000000.ckpt        metrics/<table>/part-000001000000.parquet
    summary.json, report.html  written at the end       timing/<table>/...   wall-clock measurements
    failure.txt         why training failed, until it is resumed; failure-rank0.txt, ...: stacks of ranks that hung
    environment.json    commit, packages, machine   environment.diff    changes since the commit
    run_info.json       sizes, FLOPs per token          spikes/         batches logged by the guard

torch is imported where a checkpoint is read: the preflight, Hydra's sweeper and tools that only look at tables do
without it.

Tables are columnar, one part per interval (of checkpoints or of monitoring), named by the tokens at its end: a resumed
run drops the parts past its checkpoint, so that its tables equal those of an uninterrupted run.
"""

import json
import logging
import os
import secrets
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig

from dsv3.checkpoint.holding import hold
from dsv3.checkpoint.older_runs import read_part, table_parts, upgraded_summary
from dsv3.checkpoint.parts import is_run, numbered, tokens_of
from dsv3.checkpoint.run_config import read_config, read_settings
from dsv3.config.plain_settings import Settings
from dsv3.strict_json import text_of

if TYPE_CHECKING:
    import pandas as pd

log = logging.getLogger(__name__)


def write_atomically(path: Path, write: Any) -> None:
    """Call `write(temporary_path)`, flush it to disk and rename it to `path`: a reader sees the old file or the new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_of(path)
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        put_in_place(temporary, path)
    finally:
        delete(temporary)


def write_text_atomically(path: Path, text: str) -> None:
    """The same for a text, as UTF-8."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def temporary_of(path: Path) -> Path:
    """A place next to `path` to write what becomes it, which no other process of any machine is given.

    If this process is killed, `clear_leftovers` deletes what is there.
    """
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def put_in_place(temporary: Path, path: Path) -> None:
    """Rename a file or folder to `path`. A folder cannot replace another: that is out of the way for a moment."""
    if not path.is_dir() and not (temporary.is_dir() and os.path.lexists(path)):
        temporary.replace(path)
        return
    old = temporary_of(path)
    path.rename(old)
    temporary.rename(path)
    delete(old)


def delete(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def delete_checkpoint(path: Path) -> None:
    """Delete a checkpoint; a folder is out of its place before the first of its files goes."""
    going = temporary_of(path)
    path.rename(going)
    delete(going)


GROUP = 2**16
"""Numbers of a column that are read at once: who wants one row of a wide table need not read the others."""


def widest(row: Mapping[str, Any]) -> int:
    """Numbers in the longest list or array of a row."""
    sizes = [len(value) for value in row.values() if hasattr(value, "__len__") and not isinstance(value, str)]
    return max([1, *sizes])


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
            import pandas as pd

            frame = pd.DataFrame(self.rows)
            part = self.folder / f"part-{tokens:015d}.parquet"
            if part.exists():  # rows came after an earlier flush at these tokens, such as the last evaluation's
                before = read_part(part)
                frame = pd.concat([before[before.tokens < frame.tokens.iloc[0]], frame], ignore_index=True)
            group = max(1, GROUP // widest(self.rows[0]))
            write_atomically(
                part, lambda path: frame.to_parquet(path, engine="pyarrow", index=False, row_group_size=group)
            )
            self.rows = []

    def drop_after(self, tokens: int) -> None:
        """Delete the parts that end past `tokens`."""
        for part in numbered(self.folder, "part-*.parquet"):
            if tokens_of(part) > tokens:
                part.unlink()


class RunFolder:
    """Paths, tables and checkpoints of one run."""

    def __init__(self, path: str | Path, *, writes: bool = True) -> None:
        """writes: False on ranks but the first, whose rows of tables are those of rank 0 again and go nowhere."""
        self.path = Path(path).absolute()
        self.writes = writes
        self.config_path = self.path / "config.yaml"
        self.summary_path = self.path / "summary.json"
        self.failure_path = self.path / "failure.txt"
        self.tokenizer_path = self.path / "tokenizer"
        self.held_out_path = self.path / "held_out"
        self.tables: dict[str, Table] = {}

    def config(self) -> DictConfig:
        """The run's config.yaml; keys and values of older versions under their names of today. See `read_config`."""
        return read_config(self.config_path)

    def settings(self) -> Settings:
        """The same as plain mappings and lists. See `read_settings`."""
        return read_settings(self.config_path)

    def table(self, name: str) -> Table:
        """The table that rows are added to, e.g. `metrics/train`."""
        return self.tables.setdefault(name, Table(self.path / name))

    def flush(self, tokens: int) -> None:
        """Write the rows of all tables, up to `tokens`; `metrics/train` last: it tells how far a run is."""
        for name in sorted(self.tables, key=lambda name: name == "metrics/train"):
            if self.writes:
                self.tables[name].flush(tokens)
            else:
                self.tables[name].rows = []

    def read(self, name: str) -> "pd.DataFrame":
        """All parts of a table in order, e.g. `metrics/train`; empty if there are none."""
        import pandas as pd

        parts = table_parts(self.path, name)
        return pd.concat([read_part(part) for part in parts], ignore_index=True) if parts else pd.DataFrame()

    def drop_after(self, tokens: int) -> None:
        """Delete metrics, timing and checkpoints past a checkpoint."""
        for folder in [*self.path.glob("metrics/*"), *self.path.glob("timing/*")]:
            Table(folder).drop_after(tokens)
        for checkpoint in self.checkpoints():
            if tokens_of(checkpoint) > tokens:
                delete_checkpoint(checkpoint)

    def checkpoint_path(self, tokens: int) -> Path:
        return self.path / "checkpoints" / f"tokens-{tokens:015d}.ckpt"

    def checkpoints(self) -> list[Path]:
        """All of them, oldest first."""
        return numbered(self.path / "checkpoints", "tokens-*.ckpt")

    def begun(self) -> bool:
        """Whether a run could lose anything: a checkpoint or a table."""
        return bool(self.checkpoints()) or next(self.path.glob("*/*/part-*.parquet"), None) is not None

    def newest_valid_checkpoint(self) -> Path | None:
        """The newest checkpoint that is whole; corrupt ones are passed over with a warning.

        Raises:
            ValueError: one may not be read, which does not make it corrupt.
        """
        for path in reversed(self.checkpoints()):
            if is_valid(path):
                return path
            log.warning("%s is corrupt; trying an older checkpoint", path)
        return None

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        text = text_of(summary) + "\n"
        write_text_atomically(self.summary_path, text)

    def summary(self) -> dict[str, Any] | None:
        """summary.json; None where the run has not ended, or the file is damaged, which a warning says."""
        if not self.summary_path.exists():
            return None
        try:
            return upgraded_summary(json.loads(self.summary_path.read_text()))
        except ValueError:
            log.warning("%s is corrupt; taking the run for unfinished", self.summary_path)
            return None

    def write_failure(self, error: Exception) -> None:
        if not self.writes:
            return
        text = f"{error or type(error).__name__}\n"
        write_text_atomically(self.failure_path, text)

    def failure(self) -> str | None:
        """Why training ended with an error; None where it did not."""
        return self.failure_path.read_text().strip() if self.failure_path.exists() else None

    def hold(self) -> None:
        """Keep other processes from training in this folder until this one ends.

        Raises:
            ValueError: another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            self._lock = hold(self.path)
        except BlockingIOError:
            raise ValueError(f"run.dir={self.path}: another process is training there") from None

    def clear_leftovers(self) -> None:
        """Delete half-written files and checkpoint folders of processes that were killed, by the process that holds the
        run folder."""
        for path in list(self.path.rglob(".*.tmp")):
            delete(path)

    def release(self) -> None:
        """Let other runs have the folder, this process's own among them."""
        if self.writes:
            self._lock.close()

    def move_aside(self) -> Path:
        """Rename the folder to the first free `<name>.old-<n>`, so that a new run can begin."""
        n = 1
        while (target := self.path.with_name(f"{self.path.name}.old-{n}")).exists():
            n += 1
        return self.path.rename(target)


def is_valid(checkpoint: Path) -> bool:
    """Whether the file or folder is a checkpoint and whole: checksums of its contents, and torch reads its directory.

    Raises:
        ValueError: it may not be read.
    """
    from dsv3.checkpoint.checkpoint_folder import MANIFEST, is_whole  # torch

    is_folder = checkpoint.is_dir()
    if is_folder and not (checkpoint / MANIFEST).is_file():
        return False
    try:
        with (checkpoint / MANIFEST if is_folder else checkpoint).open("rb"):
            pass
    except OSError as error:
        raise ValueError(
            f"{checkpoint} may not be read ({error.strerror}): make it readable, or move it away"
        ) from None
    try:
        if is_folder:
            whole = is_whole(checkpoint)
        else:
            with zipfile.ZipFile(checkpoint) as archive:
                whole = archive.testzip() is None
        return whole and bool(load_checkpoint(checkpoint, mmap=True))
    except Exception:  # which one a damaged archive raises is up to zipfile and zlib
        return False


def load_checkpoint(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """Tensors and plain containers only; nothing in the file or folder is executed.

    mmap: tensors stay on disk until used. Of a folder, weights, their average and the optimiser's state then come as
    `dsv3.checkpoint.checkpoint_folder.Stored`.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is not a checkpoint of this project.
    """
    import torch

    from dsv3.checkpoint.checkpoint_folder import read_folder

    try:
        if Path(path).is_dir():
            content = read_folder(Path(path), lazy=mmap)
        else:
            content = torch.load(str(path), map_location="cpu", weights_only=True, mmap=mmap)
    except OSError:
        raise
    except Exception:  # which one a foreign file raises is up to torch, and so is its advice to execute it
        content = None
    if not isinstance(content, dict) or not {"state_dict", "dsv3", "callbacks"} <= content.keys():
        raise ValueError(f"{path} is not a checkpoint of this project (nothing in it was executed)")
    return content


def find_run(checkpoint: str | Path) -> tuple[RunFolder, Path]:
    """The run folder and the checkpoint that a user names by either of them.

    Raises:
        FileNotFoundError: there is no such path, no valid checkpoint, or no config.yaml.
        ValueError: a checkpoint may not be read.
    """
    path = Path(checkpoint)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint={checkpoint}: there is no such file or folder")
    folder = RunFolder(path if is_run(path) else path.absolute().parent.parent)
    file = folder.newest_valid_checkpoint() if is_run(path) else path
    if file is None:
        found = "no valid checkpoints/tokens-*.ckpt in this folder"
        if (path / "config.json").is_file() and not folder.config_path.exists():
            found = f"a Hugging Face checkpoint; `python -m dsv3 import path={checkpoint} out=RUN` makes a run of it"
        raise FileNotFoundError(f"checkpoint={checkpoint}: {found}")
    if not folder.config_path.exists():
        raise FileNotFoundError(f"checkpoint={checkpoint}: {folder.config_path} is missing")
    return folder, file
