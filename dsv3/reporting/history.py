"""Reads a run folder during or after training: tables, state, units."""

import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd

from dsv3.checkpoint.holding import is_held
from dsv3.checkpoint.older_runs import columns_of, file_to_read, read_part, read_parts, table_names, table_parts
from dsv3.checkpoint.run_folder import RunFolder
from dsv3.config.plain_settings import Settings, value_of
from dsv3.reporting.routing_history import RoutingHistory
from dsv3.strict_json import read_json

log = logging.getLogger(__name__)
Made = TypeVar("Made")

QUIET_SECONDS = 900  # without a new part, an unfinished run of another machine counts as stopped
SMOOTHING = 0.95  # of a curve's exponential mean, by step
SETTLED_SECONDS = 2  # since a folder's last change: it has been seen by whoever lists it now
MOST_SPIKES = 10  # that are shown


class History:
    """Reads only the parts of a table that it has not read yet. `name` is relative to the folder that was asked for."""

    def __init__(self, path: Path, name: str) -> None:
        self.folder = RunFolder(path)
        self.name = name
        self._parts: dict[str, tuple[int, list[Path]]] = {}
        self._tables: dict[tuple[str, tuple[str, ...]], tuple[list[Path], int, pd.DataFrame]] = {}
        self._newest: dict[tuple[str, tuple[str, ...]], tuple[Path, int, pd.DataFrame]] = {}
        self._info: tuple[int, dict[str, Any]] = (0, {})
        self._summary: tuple[int | None, dict[str, Any] | None] = (None, None)
        self._settings: tuple[int, Settings] = (0, {})
        self._routing = RoutingHistory()
        self._kept: dict[str, tuple[tuple[Any, ...], Any]] = {}

    def parts(self, name: str) -> list[Path]:
        """Parts of a table in order; listed again only where its folder may have changed."""
        folders = [self.folder.path / each for each in table_names(name)]
        changed = max((folder.stat().st_mtime_ns for folder in folders if folder.exists()), default=0)
        known, parts = self._parts.get(name, (-1, []))
        if known != changed:
            parts = table_parts(self.folder.path, name)
            # A change within the same tick of the file system's clock would not be seen.
            settled = time.time_ns() - changed > SETTLED_SECONDS * 10**9
            self._parts[name] = (changed if settled else -1, parts)
        return parts

    def table(self, name: str, columns: Sequence[str] = ()) -> pd.DataFrame:
        """All rows of a table, e.g. `metrics/train`, in order. columns: those to read, where they are; none: all."""
        parts, wanted = self.parts(name), (name, tuple(columns))
        known, written, frame = self._tables.get(wanted, ([], 0, pd.DataFrame()))
        same = parts[: len(known)] == known and (not known or known[-1].stat().st_mtime_ns == written)
        if parts != known or not same:
            if not same:  # a run that went back to a checkpoint, or added to its last part
                known, frame = [], pd.DataFrame()
            written = parts[-1].stat().st_mtime_ns if parts else 0
            new = [read_parts(parts[len(known) :], columns)] if len(parts) > len(known) else []
            frame = pd.concat([*([frame] if known else []), *new], ignore_index=True) if parts else pd.DataFrame()
            self._tables[wanted] = (parts, written, frame)
            if wanted == ("metrics/train", ()) and (gap := missing_steps(frame)):
                log.warning("%s: %s of metrics/train are missing; a part was deleted", self.folder.path, gap)
        return frame

    def newest(self, name: str, columns: Sequence[str] = ()) -> pd.DataFrame:
        """The rows of a table's newest part alone. columns: as for `table`."""
        parts, wanted = self.parts(name), (name, tuple(columns))
        if not parts:
            return pd.DataFrame()
        now = (parts[-1], parts[-1].stat().st_mtime_ns)
        if wanted not in self._newest or self._newest[wanted][:2] != now:
            self._newest[wanted] = (*now, read_part(parts[-1], columns))
        return self._newest[wanted][2]

    def kept(self, name: str, sources: tuple[Any, ...], make: Callable[[], Made]) -> Made:
        """What `make` returned when the sources (tables, a `RoutingHistory`) were the same objects as now."""
        before = self._kept.get(name)
        if before is None or any(now is not then for now, then in zip(sources, before[0], strict=True)):
            before = self._kept[name] = (sources, make())
        made: Made = before[1]
        return made

    def routing(self, *, most_new: int | None = None) -> RoutingHistory:
        """The load of every expert over all intervals. most_new: read no more than so many further parts."""
        parts = self.parts("metrics/routing")
        self._routing = self._routing.grown(parts if most_new is None else parts[: len(self._routing.parts) + most_new])
        return self._routing

    @property
    def summary(self) -> dict[str, Any] | None:
        """See `RunFolder.summary`."""
        path = self.folder.summary_path
        changed = path.stat().st_mtime_ns if path.exists() else None
        if changed != self._summary[0]:
            self._summary = (changed, self.folder.summary())
        return self._summary[1]

    @property
    def settings(self) -> Settings:
        """See `RunFolder.settings`."""
        if (changed := self.folder.config_path.stat().st_mtime_ns) != self._settings[0]:
            self._settings = (changed, self.folder.settings())
        return self._settings[1]

    def setting(self, key: str) -> Any:
        """What stands under a dotted key of its settings; None where nothing does."""
        return value_of(self.settings, key)

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
        columns = set(self.newest("metrics/train").columns)
        return {name: unit for name, unit in declared.items() if name in columns}

    @property
    def began(self) -> float:
        """When, by the clock of the machine that began it; 0 where the run is gone."""
        try:
            return self.folder.config_path.stat().st_mtime
        except OSError:
            return 0.0

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
        parts = [*self.parts("timing/train")[-1:], self.folder.config_path]
        newest = max(part.stat().st_mtime for part in parts if part.exists())
        return "training" if time.time() - newest < QUIET_SECONDS else "stopped"

    @property
    def tokens(self) -> int:
        train = self.table("metrics/train")
        return 0 if train.empty else int(train.tokens.iloc[-1])

    def train(self) -> pd.DataFrame:
        """`metrics/train` with `seconds` and `flops` since the beginning, and statistics smoothed as `<name>_mean`."""
        tables = self.table("metrics/train"), self.table("timing/train")
        return self.kept("train", tables, lambda: self._join(*tables))

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
        return self.kept(f"validation of {weights}", (scores, timing), lambda: self._timed(scores, timing, weights))

    def _timed(self, scores: pd.DataFrame, timing: pd.DataFrame, weights: str) -> pd.DataFrame:
        clock = pd.concat([pd.DataFrame({"tokens": [0], "seconds": [0.0]}), timing], ignore_index=True)
        clock["seconds"] = clock.seconds.cumsum()
        scores = scores[scores.weights == weights].merge(clock, on="tokens", how="left")
        return scores.assign(flops=scores.tokens * self.info.get("flops_per_token", float("nan")))

    def before(self, budget: str) -> float:
        """What the earlier stages of this run's arm took of a budget: tokens, flops or seconds; 0 where it has none."""
        if (self.setting("study.stage") or 1) == 1:
            return 0.0
        source = self.setting("run.init_from")
        earlier = History(self._of_study(Path(source)), source)
        scores = earlier.validation()
        if scores.empty:
            raise FileNotFoundError(f"{source}: the stage before {self.name} is not there any more")
        return float(scores[budget].iloc[-1]) + earlier.before(budget)

    def _of_study(self, path: Path) -> Path:
        """Another run of this run's study, wherever the study has been moved to, or is looked at from."""
        depth = len(Path(self.setting("run.name")).parts) - 1
        try:
            inside = path.relative_to(Path(self.setting("run.dir")).parents[depth])
        except (ValueError, IndexError):  # it lies elsewhere, or this run's folder was named by hand
            return path
        return self.folder.path.absolute().parents[depth] / inside

    def spikes(self) -> list[dict[str, Any]]:
        """The latest `MOST_SPIKES` that the guard against loss spikes wrote down, oldest first."""
        paths = sorted(self.folder.path.glob("spikes/tokens-*.json"))
        return [read_json(path) for path in paths[-MOST_SPIKES:]]

    def tables_by_role(self) -> dict[str, pd.DataFrame]:
        """Tables with a row for each role of layer, such as diagnostics of a number format."""
        names = sorted(f"metrics/{path.name}" for path in self.folder.path.glob("metrics/*"))
        newest = {name: parts[-1] for name in names if (parts := self.parts(name))}
        return {name: self.table(name) for name, part in newest.items() if "role" in columns_of(part)}


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
        children = [child for child in root.iterdir() if child.is_dir() and ".old-" not in child.name]
    except OSError as error:
        log.warning("%s is left out: %s", root, error.strerror)
        return
    for child in sorted(children, key=naturally):
        yield from run_folders(child, seen)


def naturally(path: Path) -> list[tuple[bool, int, str]]:
    """Key that sorts seed2 before seed10."""
    words = re.split(r"(\d+)", path.name)
    return [(word.isdecimal(), int(word) if word.isdecimal() else 0, word) for word in words]
