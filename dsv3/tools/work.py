"""Take part in a study: train runs of its queue that nobody has taken, until all have ended, and write the report."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.cli import REQUIRED, option

FIRST = "folder"


@dataclass
class Options:
    folder: str = option(REQUIRED, "a study's folder, such as runs/table4_mtp, of this machine or shared with others")
    retry: bool = option(False, "try failed runs again")
    allow: list[str] = option([], "classes outside conf/ that the queue may name: [package.Class]")
    overrides: list[str] = option([], "of every run that this worker trains, after those of the queue")


def run(options: Options) -> dict[str, Any]:
    """Work, and print the study's verdict. A run that fails leaves the others to be trained.

    Raises:
        FileNotFoundError: the folder has no queue.
        ValueError: the queue asks for more than a queue may.
        SystemExit: 1 where runs failed; the exit status of a run that was interrupted.
    """
    from dsv3.config.compose import hydra_flags, opened
    from dsv3.study.run_queue import Entry, Queue
    from dsv3.study.worker import command, train_apart, work
    from dsv3.tools.report import report_of_ended

    study = Path(options.folder)
    queue = Queue(study)
    if not (entries := queue.entries()):
        raise FileNotFoundError(f"{study}: no queue of a study; `python train.py experiment=STUDY` writes one")
    flags = hydra_flags(options.overrides)
    own = ["--config-dir", flags.config_dir] if flags.config_dir else []
    with opened("train", flags) as composer:
        for entry in entries:  # what may not be trained is refused before anything is
            command(composer, study, entry, allow=options.allow)
        if options.retry:
            for ended in queue.states():
                if ended.state == "failed":
                    queue.retry(ended.entry)

        def train(entry: Entry) -> str | None:
            given = command(composer, study, entry, allow=options.allow)
            return train_apart(study, entry, given._replace(overrides=[*given.overrides, *flags.overrides]), own)

        work(queue, train)
    failed = [ended for ended in queue.states() if ended.state == "failed"]
    report_of_ended(study)
    for ended in failed:
        print(f"{ended.entry.run} failed: {ended.why}", file=sys.stderr)
    if failed:
        print(f"error: {len(failed)} of {len(queue.entries())} runs failed", file=sys.stderr)
        sys.exit(1)
    return {"runs": [{"run": ended.entry.run, "state": ended.state} for ended in queue.states()]}
