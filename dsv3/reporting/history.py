"""Reads a run folder during or after training: tables, state, units."""

import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from omegaconf import DictConfig, OmegaConf

from dsv3.checkpoint.holding import is_held
from dsv3.checkpoint.older_runs import file_to_read, read_part, read_parts, table_parts
from dsv3.checkpoint.run_folder import RunFolder
from dsv3.reporting.routing_history import RoutingHistory
from dsv3.strict_json import read_json

log = logging.getLogger(__name__)

QUIET_SECONDS = 900  # without a new part, an unfinished run of another machine counts as stopped
SMOOTHING = 0.95  # of a curve's exponential mean, by step
MOST_SPIKES = 10  # that are shown


class History:
    """Reads only the parts of a table that it has not read yet. `name` is relative to the folder that was asked for."""

    def __init__(self, path: Path, name: str) -> None:
        self.folder = RunFolder(path)
        self.name = name
        self._tables: dict[str, tuple[list[Path], int, pd.DataFrame]] = {}
        self._info: tuple[int, dict[str, Any]] = (0, {})
        self._config: tuple[int, DictConfig] = (0, OmegaConf.create())
        self._routing = RoutingHistory()
        self._joined = (pd.DataFrame(), pd.DataFrame(), pd.DataFrame())
        self._validation: dict[str, tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]] = {}

    def table(self, name: str) -> pd.DataFrame:
        """All rows of a table, e.g. `metrics/train`, in order."""
        parts = table_parts(self.folder.path, name)
        known, written, frame = self._tables.get(name, ([], 0, pd.DataFrame()))
        same = parts[: len(known)] == known and (not known or known[-1].stat().st_mtime_ns == written)
        if parts != known or not same:
            if not same:  # a run that went back to a checkpoint, or added to its last part
                known, frame = [], pd.DataFrame()
            written = parts[-1].stat().st_mtime_ns if parts else 0
            new = [read_parts(parts[len(known) :])] if len(parts) > len(known) else []
            frame = pd.concat([*([frame] if known else []), *new], ignore_index=True) if parts else pd.DataFrame()
            self._tables[name] = (parts, written, frame)
            if name == "metrics/train" and (gap := missing_steps(frame)):
                log.warning("%s: %s of metrics/train are missing; a part was deleted", self.folder.path, gap)
        return frame

    def newest(self, name: str) -> pd.DataFrame:
        """The rows of a table's newest part alone."""
        parts = table_parts(self.folder.path, name)
        return read_part(parts[-1]) if parts else pd.DataFrame()

    def routing(self) -> RoutingHistory:
        """The load of every expert over all intervals."""
        self._routing = self._routing.grown(self.folder.path)
        return self._routing

    @property
    def summary(self) -> dict[str, Any] | None:
        return self.folder.summary()

    @property
    def config(self) -> DictConfig:
        """See `RunFolder.config`."""
        if (changed := self.folder.config_path.stat().st_mtime_ns) != self._config[0]:
            self._config = (changed, self.folder.config())
        return self._config[1]

    @property
    def info(self) -> dict[str, Any]:
        """The run_info.json that `dsv3.training.run_info` writes before the first step; empty until then."""
        path = file_to_read(self.folder.path, "run_info.json")
        if path.exists() and (changed := path.stat().st_mtime_ns) != self._info[0]:
            self._info = (changed, read_json(path))
        return self._info[1]

    def statistics(self) -> dict[str, str]:
        """Unit of every figure that the objective and the parts record of a step, the loss first."""
        declared = {figure["name"]: figure["unit"] for figure in self.info.get("statistics", [])}
        if not declared:  # a run of an older version
            units = {"loss": "nats per token", "bpb": "bits per byte"}
            declared = units | {f"mtp{depth}_loss": "nats per token" for depth in range(1, 9)}
        columns = self.newest("metrics/train").columns
        return {name: unit for name, unit in declared.items() if name in columns}

    @property
    def state(self) -> str:
        """finished, failed, training, or stopped: interrupted or killed.

        A run of another machine counts as stopped where its next part is long in coming.
        """
        if self.folder.summary_path.exists():
            return "finished"
        if self.folder.failure_path.exists():
            return "failed"
        if (held := is_held(self.folder.path)) is not None:
            return "training" if held else "stopped"
        parts = [*self.folder.path.glob("timing/train/part-*.parquet"), self.folder.config_path]
        newest = max(part.stat().st_mtime for part in parts if part.exists())
        return "training" if time.time() - newest < QUIET_SECONDS else "stopped"

    @property
    def tokens(self) -> int:
        train = self.table("metrics/train")
        return 0 if train.empty else int(train.tokens.iloc[-1])

    def train(self) -> pd.DataFrame:
        """`metrics/train` with `seconds` and `flops` since the beginning, and statistics smoothed as `<name>_mean`."""
        tables = self.table("metrics/train"), self.table("timing/train")
        if any(now is not before for now, before in zip(tables, self._joined[:2], strict=True)):
            self._joined = (*tables, self._join(*tables))
        return self._joined[2]

    def _join(self, train: pd.DataFrame, timing: pd.DataFrame) -> pd.DataFrame:
        timing = timing.reindex(columns=["tokens", "seconds"])
        if train.empty:
            return train
        train = train.assign(flops=train.tokens * self.info.get("flops_per_token", float("nan")))
        smoothed = {f"{c}_mean": train[c].ewm(alpha=1 - SMOOTHING).mean() for c in self.statistics()}
        train = train.assign(**smoothed)
        return train.merge(timing.assign(seconds=timing.seconds.cumsum()), on="tokens", how="left")

    def validation(self, *, weights: str = "live") -> pd.DataFrame:
        """Rows of `metrics/validation` with `seconds` and `flops` of training since the beginning."""
        scores, timing = self.table("metrics/validation"), self.table("timing/train")
        if scores.empty:
            return scores
        known = self._validation.get(weights)
        if known is None or known[0] is not scores or known[1] is not timing:
            self._validation[weights] = known = (scores, timing, self._timed(scores, timing, weights))
        return known[2]

    def _timed(self, scores: pd.DataFrame, timing: pd.DataFrame, weights: str) -> pd.DataFrame:
        clock = pd.concat([pd.DataFrame({"tokens": [0], "seconds": [0.0]}), timing], ignore_index=True)
        clock["seconds"] = clock.seconds.cumsum()
        scores = scores[scores.weights == weights].merge(clock, on="tokens", how="left")
        return scores.assign(flops=scores.tokens * self.info.get("flops_per_token", float("nan")))

    def before(self, budget: str) -> float:
        """What the earlier stages of this run's arm took of a budget: tokens, flops or seconds; 0 where it has none."""
        config = self.config
        if (OmegaConf.select(config, "study.stage") or 1) == 1:
            return 0.0
        earlier = History(Path(config.run.init_from), config.run.init_from)
        scores = earlier.validation()
        if scores.empty:
            raise FileNotFoundError(f"{config.run.init_from}: the stage before {self.name} is not there any more")
        return float(scores[budget].iloc[-1]) + earlier.before(budget)

    def spikes(self) -> list[dict[str, Any]]:
        """The latest `MOST_SPIKES` that the guard against loss spikes wrote down, oldest first."""
        paths = sorted(self.folder.path.glob("spikes/tokens-*.json"))
        return [read_json(path) for path in paths[-MOST_SPIKES:]]

    def tables_by_role(self) -> dict[str, pd.DataFrame]:
        """Tables with a row for each role of layer, such as diagnostics of a number format."""
        names = sorted(f"metrics/{path.name}" for path in self.folder.path.glob("metrics/*"))
        return {name: self.table(name) for name in names if "role" in self.newest(name).columns}


def missing_steps(train: pd.DataFrame) -> str | None:
    """The first gap in the numbers of the steps, e.g. "steps 5 to 8"; a branch's table begins later, without a gap."""
    steps = train["step"] if "step" in train else pd.Series(dtype=int)
    after = steps[steps.diff() > 1]
    if after.empty:
        return None
    end = int(after.iloc[0])
    return f"steps {int(steps[after.index[0] - 1]) + 1} to {end - 1}"


def find_runs(root: Path) -> list[History]:
    """Every run folder in `root` (or `root` itself), by name; those moved aside (`.old-<n>`) are left out.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: there is no such folder")
    return [
        History(folder, str(folder.relative_to(root)) if folder != root else folder.absolute().name)
        for folder in run_folders(root)
    ]


def run_folders(root: Path, seen: set[Path] | None = None) -> Iterator[Path]:
    """Folders with a config.yaml; nothing inside of one is looked at, and no folder twice, whatever links lead to it.

    A folder that may not be read is named in a warning and left out.
    """
    seen = set() if seen is None else seen
    try:
        if (place := root.resolve()) in seen:
            return
        seen.add(place)
        if (root / "config.yaml").exists():
            yield root
            return
        children = sorted(child for child in root.iterdir() if child.is_dir() and ".old-" not in child.name)
    except OSError as error:
        log.warning("%s is left out: %s", root, error.strerror)
        return
    for child in children:
        yield from run_folders(child, seen)
