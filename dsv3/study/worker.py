"""A worker takes runs from the queue of a study and trains each in a process of its own, until all have ended.

A queue's folder may come from anyone, and says what is trained: `command` refuses what a run folder could not do either
(docs/security.md).
"""

import ctypes
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import DictConfig, OmegaConf

from dsv3.checkpoint.run_folder import RunFolder
from dsv3.config.compose import COMPOSITION_ERRORS, Composer
from dsv3.config.known_parts import refuse_unknown_parts
from dsv3.config.overrides import first_line
from dsv3.paths import ROOT
from dsv3.runtime import OUT_OF_TIME
from dsv3.study.run_queue import QUEUE, Entry, Queue

POLL = 5.0
"""Seconds between two looks at a queue all of whose runs are taken or have ended."""
INTERRUPTED = (OUT_OF_TIME, 130, 143)
"""Exit statuses of a run that can go on where it was."""
PROTECTED = ("allow", "run.on_end", "benchmarks.folders", "data.cache_dir")
"""Keys that an entry may not set, only an option in conf/: they name code, programs and places to write to."""
PLAIN = re.compile(r"\$\{[A-Za-z0-9_.]+\}")
"""An interpolation of another key. A resolver would read environment variables, say."""


class Command(NamedTuple):
    """Overrides of `train.py`, and the folder that it is to be called in."""

    overrides: list[str]
    folder: Path


def work(queue: Queue, train: Callable[[Entry], str | None]) -> None:
    """Take runs and train them until every run of the queue has ended, also those that other workers have taken, and no
    command is left that adds runs.

    train: why the run failed, or None. What it raises ends the worker, and leaves the run to others.
    """
    while queue.grows() or any(run.state in ("waiting", "running") for run in queue.states()):
        if not any(attempt(queue, entry, train) for entry in queue.ready()):
            time.sleep(POLL)


def attempt(queue: Queue, entry: Entry, train: Callable[[Entry], str | None]) -> bool:
    """Train the run if it can be claimed; whether it could."""
    with queue.claimed(entry) as mine:
        if mine and (why := train(entry)) is not None:
            queue.fail(entry, why)
        return mine


def train_apart(study: Path, entry: Entry, given: Command, flags: Sequence[str]) -> str | None:
    """Train a run by `train.py` in a process of its own; why it failed, or None.

    flags: Hydra's, such as --config-dir.

    Raises:
        SystemExit: this process is to end, or the run's time is up; with the run's exit status.
    """
    program = [sys.executable, str(ROOT / "train.py"), *flags, *given.overrides, "hydra.mode=RUN"]
    libc = ctypes.CDLL(None)

    def end_with_worker() -> None:  # a worker that is killed leaves no run behind that nobody claims
        if hasattr(libc, "prctl"):
            libc.prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG

    # In a group of its own: what a terminal sends to the worker's comes to the run once, through the worker.
    process = subprocess.Popen(program, cwd=given.folder, process_group=0, preexec_fn=end_with_worker)
    with ExitStack() as stack:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            before = signal.signal(number, lambda number, _: process.send_signal(number))
            stack.callback(signal.signal, number, before)
        status = process.wait()
    if status in INTERRUPTED:
        sys.exit(status)
    if status == 0:
        return None
    ended = f"exit status {status}" if status > 0 else f"ended by {signal.Signals(-status).name}"
    return RunFolder(study / entry.run).failure() or ended


def command(composer: Composer, study: Path, entry: Entry, *, allow: Collection[str] = ()) -> Command:
    """How to train a run of the queue.

    Its overrides choose options and set keys of these, no more: they name no code but parts that conf/ names for their
    kind and what `allow` admits, no folder of configurations, no program, no resolver; and the run lies in the study.

    Raises:
        ValueError: they do more, or do not compose.
    """
    file = study / QUEUE / f"{entry.name}.json"
    try:
        parsed = OverridesParser.create().parse_overrides(entry.overrides)
        refused = [override.input_line for override in parsed if not is_harmless(composer, override)]
        if refused:
            raise ValueError(f"{file}: a queue may not say {', '.join(map(str, refused))}")
        config = composer.compose(entry.overrides)
        options = [str(override.input_line) for override in parsed if composer.options(override.key_or_group)]
        trusted = composer.compose(options)
        content, known = contents(config), set(strings(contents(trusted)))
        if computed := [text for text in strings(content) if "${" in PLAIN.sub("", text) and text not in known]:
            raise ValueError(f"{file}: a queue may name other keys in ${{...}}, and nothing else: {computed[0]}")
        for key in PROTECTED:
            if OmegaConf.select(config, key) != OmegaConf.select(trusted, key):
                raise ValueError(f"{file}: a queue may not set {key}")
    except COMPOSITION_ERRORS as error:
        message = str(error) if str(error).startswith(str(file)) else f"{file}: {first_line(error)}"
        raise ValueError(message) from None
    refuse_unknown_parts(content, source=file, allow=allow)
    given = [f"allow=[{','.join(allow)}]"] if allow else []
    return Command([*entry.overrides, *given], working_folder(study, entry, config))


def contents(config: DictConfig) -> dict[str, Any]:
    """A composed configuration as data, Hydra's own left out; nothing is resolved."""
    content = OmegaConf.to_container(config, resolve=False)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items() if key != "hydra"}


def strings(node: Any) -> Iterator[str]:
    """Every key and value that is text, at any depth."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from (*strings(key), *strings(value))
    elif isinstance(node, list):
        for value in node:
            yield from strings(value)
    elif isinstance(node, str):
        yield node


def is_harmless(composer: Composer, override: Override) -> bool:
    """Whether it chooses an option by its name or sets a key, Hydra's own left out."""
    key, value = override.key_or_group, override.get_value_element_as_str() if override.value() is not None else ""
    if override.is_sweep_override() or re.split("[./@]", key)[0] == "hydra":
        return False
    if options := composer.options(key):
        return override.type == OverrideType.DEL or value in options
    return "/" not in key


def working_folder(study: Path, entry: Entry, config: DictConfig) -> Path:
    """The folder in which `run.dir` of the run is the place that it has in the study.

    Raises:
        ValueError: there is none, so that the run would train elsewhere.
    """
    place, named = (study / entry.run).absolute(), Path(config.run.dir)
    if named.is_absolute() and named == place:
        return Path.cwd()
    if not named.is_absolute() and ".." not in named.parts and place.parts[-len(named.parts) :] == named.parts:
        return Path(*place.parts[: -len(named.parts)])
    raise ValueError(f"{study / QUEUE / entry.name}.json: run.dir={named} is not {entry.run} in this study")
