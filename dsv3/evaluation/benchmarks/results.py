"""Results in lm-eval's format, all generations, the table.

    results.json                lm-eval's results of all tasks together, and under "dsv3" what is ours
    tasks/<task>.json           the same of one task, with the key of the settings it was run with
    samples_<task>.jsonl        every document with prompt, generations, scores
    episodes/<task>.json        of agents, the first won and the first lost episode

A task whose file carries the same key is not run again: an interrupted evaluation goes on where it stopped.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from dsv3.checkpoint.run_folder import write_text_atomically
from dsv3.evaluation.benchmarks.statistics import uncertainty
from dsv3.evaluation.benchmarks.suite import Outcome
from dsv3.strict_json import read_json, text_of

SCORING = 2
"""Raised when answers are scored otherwise, so that results from before are not taken for today's."""


class Score(NamedTuple):
    """One metric of one task."""

    task: str
    metric: str  # with the filter's name after a comma where the task has several
    value: float
    stderr: float  # NaN where it is not known
    n: int  # documents; 0 where it is not known
    shots: float


class ResultsFolder:
    def __init__(self, path: Path) -> None:
        self.path = path

    def finished(self, name: str, key: str) -> bool:
        """Whether this task was run with these settings; a file that a killed evaluation left half-written is not."""
        try:
            return read_json(self._file(name))["key"] == key
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return False

    def write(self, name: str, key: str, outcome: Outcome) -> None:
        for task, samples in outcome.samples.items():
            lines = "".join(text_of(sample, indent=None) + "\n" for sample in samples)
            write_text_atomically(self.samples_path(task), lines)
        write_episodes(self.path, outcome.episodes)
        content = {
            "key": key,
            "results": outcome.results,
            "shots_used": outcome.shots_used,
            "seconds": round(outcome.seconds, 2),
        }
        write_text_atomically(self._file(name), text_of(content) + "\n")
        self.journal_path(name, key).unlink(missing_ok=True)

    def combine(self, names: Sequence[str], *, about: Mapping[str, Any], failures: Mapping[str, str]) -> dict[str, Any]:
        """All tasks' results as lm-eval writes them, also into results.json."""
        parts = [read_json(self._file(name)) for name in names]
        combined: dict[str, Any] = {"results": {}}
        for part in parts:
            for section, content in part["results"].items():
                if isinstance(content, dict):
                    combined.setdefault(section, {}).update(content)
        combined["lm_eval_version"] = version("lm_eval")
        combined["dsv3"] = {
            **about,
            "shots_used": {task: used for part in parts for task, used in part["shots_used"].items()},
            "seconds": {name: part["seconds"] for name, part in zip(names, parts, strict=True)},
            "failures": dict(failures),
        }
        write_text_atomically(self.path / "results.json", text_of(combined) + "\n")
        return combined

    def journal_path(self, name: str, key: str) -> Path:
        """Where finished episodes of a task are kept until it has results."""
        return self.path / "tasks" / f"{name}-{key}.jsonl"

    def tasks(self, name: str) -> list[str]:
        """The tasks of which this task or group has samples."""
        return list(read_json(self._file(name))["shots_used"])

    def samples(self, task: str) -> list[dict[str, Any]]:
        with self.samples_path(task).open() as lines:
            return [json.loads(line) for line in lines]

    def samples_path(self, task: str) -> Path:
        return self.path / f"samples_{task}.jsonl"

    def _file(self, name: str) -> Path:
        return self.path / "tasks" / f"{name}.json"


def write_episodes(folder: Path, episodes: Mapping[str, list[dict[str, Any]]]) -> None:
    """Into episodes/<task>.json, for reports."""
    for task, shown in episodes.items():
        text = text_of(shown, indent=None) + "\n"
        write_text_atomically(folder / "episodes" / f"{task}.json", text)


def settings_key(*parts: Any) -> str:
    """Equal for equal settings, scored in the same way."""
    return hashlib.sha256(text_of([version("lm_eval"), SCORING, *parts]).encode()).hexdigest()[:16]


def scores(results: Mapping[str, Any], shots_used: Mapping[str, float]) -> Iterator[Score]:
    """Every metric in lm-eval's `results`, in its order."""
    for task, metrics in results["results"].items():
        chains = {key.split(",")[1] for key in metrics if "," in key} - {"none"}
        n = results["n-samples"].get(task, {}).get("effective", 0)
        for key, value in metrics.items():
            name, comma, chain = key.partition(",")
            if not comma or name.endswith("_stderr") or not isinstance(value, int | float):
                continue
            stderr = metrics.get(f"{name}_stderr,{chain}")
            known = isinstance(stderr, int | float)
            label = f"{name},{chain}" if len(chains) > 1 and chain != "none" else name
            yield Score(task, label, value, stderr if known else math.nan, n, shots_used.get(task, 0.0))


def score_table(rows: Sequence[Score], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in ("task", "few-shot", "n", "metric", "value", "95% interval or ± standard error"):
        table.add_column(column, justify="left" if column in ("task", "metric") else "right")
    last = None
    for row in rows:
        head = (row.task, f"{row.shots:.3g}", str(row.n or "")) if row.task != last else ("", "", "")
        table.add_row(*head, row.metric, f"{row.value:.4f}", uncertainty(row.value, row.stderr, row.n))
        last = row.task
    return table
