"""Finds tasks by name, ours and lm-eval's, and explains why one is unavailable."""

import contextlib
import difflib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub.constants
from datasets import config as datasets_config
from lm_eval.tasks import TaskManager

from dsv3.evaluation.benchmarks.code import code_eval_replaced, is_sandboxed, runs_code
from dsv3.evaluation.benchmarks.confined_scoring import confine_scoring
from dsv3.paths import ROOT
from dsv3.sandbox import Sandbox


class UnavailableError(Exception):
    """A task that cannot be run here; the message says why and what would help."""


class RunTexts:
    """Held-out texts of the run that is evaluated, for tasks that are made of them.

    Tasks get it in the argument `run` of their `custom_dataset`. lm-eval copies and prints task settings, which must
    not copy a corpus: hence the two methods at the end.
    """

    def __init__(self, read: Callable[[], Any] | None) -> None:
        """read: the run's data, asked for when the first task wants texts; None: there is no run."""
        self._read = read

    def documents(self, domain: int) -> list[str]:
        """Held-out documents of the run's domain of this index.

        Raises:
            UnavailableError: there is no run, or its data holds out nothing.
        """
        data: Any = None if self._read is None else self._read()
        if not hasattr(data, "held_out_documents"):
            raise UnavailableError("it is made of a run's held-out texts; this checkpoint has no run with any")
        return data.held_out_documents(data.domains[domain])

    def __deepcopy__(self, memo: Any) -> "RunTexts":
        return self

    def __repr__(self) -> str:
        return "the run's held-out texts"


class TaskFinder:
    """Loads tasks by name. Ours come first: indexing lm-eval's own takes ten seconds, and only their names need it."""

    def __init__(self, folders: Sequence[str], *, run: RunTexts, datasets_folder: str | None) -> None:
        """`folders`: of task YAMLs; relative ones are the project's. `datasets_folder`: see `local_datasets`."""
        self.paths = [str(ROOT / folder) for folder in folders]
        self.metadata = {"run": run}
        self.datasets_folder = datasets_folder
        self._managers: dict[bool, TaskManager] = {}

    def load(self, name: str, sandbox: Sandbox) -> dict[str, Any]:
        """lm-eval's {"tasks": ..., "groups": ..., "group_map": ...} of a task, group or tag.

        Raises:
            ValueError: there is no such name.
            UnavailableError: its data cannot be reached, or its programs cannot run here.
        """
        manager = self._manager_of(name)
        try:
            with code_eval_replaced(), local_datasets(self.datasets_folder), offline_unless_asked():
                loaded = manager.load([name])
        except UnavailableError:
            raise
        except Exception as error:  # what a task's own code raises is up to it
            raise UnavailableError(self._explain(error)) from error
        for task in loaded["tasks"].values():
            if runs_code(task):
                check_programs_can_run(task, sandbox)
            else:
                check_answers_are_confined(task, sandbox)
        return loaded

    def require(self, names: Iterable[str]) -> None:
        """Return if there are such tasks, here or in lm-eval, whether or not they can run.

        Raises:
            ValueError: there is none of some name.
        """
        for name in names:
            self._manager_of(name)

    def _manager_of(self, name: str) -> TaskManager:
        ours = self._manager(defaults=False)
        if name in ours.task_index:
            return ours
        everything = self._manager(defaults=True)
        if name not in everything.task_index:
            near = difflib.get_close_matches(name, everything.all_tasks, n=3)
            hint = f" Did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"tasks: there is no task {name}, neither here nor in lm-eval.{hint}")
        return everything

    def _manager(self, *, defaults: bool) -> TaskManager:
        if defaults not in self._managers:
            metadata: Any = self.metadata
            self._managers[defaults] = TaskManager(
                include_path=self.paths, include_defaults=defaults, metadata=metadata
            )
        return self._managers[defaults]

    def _explain(self, error: Exception) -> str:
        what = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        if isinstance(error, ModuleNotFoundError):
            return f"a package is missing: {what}"
        if isinstance(error, ConnectionError | FileNotFoundError | datasets.exceptions.DatasetsError):
            return (
                f"its data cannot be reached ({what}). HF_HUB_OFFLINE=0 allows the hub; "
                "datasets_folder=FOLDER is searched for FOLDER/<name on the hub>"
            )
        return what


def check_programs_can_run(task: Any, sandbox: Sandbox) -> None:
    if not sandbox.usable:
        raise UnavailableError(f"{sandbox.refusal}; confirm_run_unsafe_code=true runs programs without it")
    if not is_sandboxed(task) and not sandbox.unsafe:
        raise UnavailableError("runs programs outside the sandbox; confirm_run_unsafe_code=true allows it")


def check_answers_are_confined(task: Any, sandbox: Sandbox) -> None:
    try:
        confine_scoring(task)
    except ValueError as error:
        if not sandbox.unsafe:
            reason = f"parses answers outside the sandbox ({error}); confirm_run_unsafe_code=true allows it"
            raise UnavailableError(reason) from error


@contextlib.contextmanager
def local_datasets(folder: str | None) -> Iterator[None]:
    """`datasets.load_dataset(name)` reads `folder`/name within this context, where there is such a folder."""
    load = datasets.load_dataset

    def load_local(path: str, *args: Any, **kwargs: Any) -> Any:
        local = Path(folder).expanduser() / path if folder else None
        return load(str(local) if local and local.exists() else path, *args, **kwargs)

    datasets.load_dataset = load_local
    try:
        yield
    finally:
        datasets.load_dataset = load


@contextlib.contextmanager
def offline_unless_asked() -> Iterator[None]:
    """Nothing is asked of the hub within this context unless HF_HUB_OFFLINE=0 is set: a missing set fails at once."""
    offline = os.environ.get("HF_HUB_OFFLINE", "1").lower() not in ("0", "false", "no", "")
    before = huggingface_hub.constants.HF_HUB_OFFLINE, datasets_config.HF_HUB_OFFLINE
    huggingface_hub.constants.HF_HUB_OFFLINE = datasets_config.HF_HUB_OFFLINE = offline
    try:
        yield
    finally:
        huggingface_hub.constants.HF_HUB_OFFLINE, datasets_config.HF_HUB_OFFLINE = before
