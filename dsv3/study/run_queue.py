"""The queue of a study: a file for each run in `queue/` of its folder, which any number of processes take runs from.

    NAME.json       the run: its folder, overrides, and the run that it begins with; all are written before one starts
    NAME.claim-3    taken for the third time; touched every HEARTBEAT seconds, and locked, as long as the worker lives
    NAME.failed     why it failed: no worker tries it again until it is asked to
    more-ID.claim-1 held by a command that may add runs, as `study.until` does

A claim is a hard link to a file that is complete and locked: the file system lets one worker make it, over NFS too. Its
worker is dead if, on the machine that it was made on, its lock is free, or if, on any other, it was not touched for
STALE seconds. Then the next number may be claimed, which again one worker can. A run that is finished says so by its
own summary.json.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import re
import signal
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

from dsv3.checkpoint.holding import is_held
from dsv3.checkpoint.run_folder import RunFolder, write_text_atomically
from dsv3.strict_json import text_of

QUEUE = "queue"
HEARTBEAT, STALE = 15, 120
"""Seconds between two touches of a claim; without one for so long, a claim of another machine is dead."""
MOST_DEATHS = 4
"""Workers that died over one run: then the run is taken for the cause."""
MORE = "more"
"""Begins the names of claims on the queue itself."""
MOST_BYTES = 1_000_000
"""Of a queue's file that is read; nothing that this project writes is as long."""

State = Literal["finished", "failed", "running", "waiting"]


class Entry(NamedTuple):
    """A run that a queue holds."""

    run: str  # its folder, within the study's
    overrides: list[str]
    number: int  # order in which runs are taken
    after: str | None  # the run of this queue that it begins with
    tokens: int  # that it trains on

    @property
    def name(self) -> str:
        """Of its files."""
        return name_of(self.run)


class QueuedRun(NamedTuple):
    """A run and its state. `worker` and `since` (seconds since 1970) of the claim, while it is running."""

    entry: Entry
    state: State
    worker: str | None = None
    since: float | None = None
    why: str | None = None  # it failed


def read_queue(study: Path) -> list[QueuedRun]:
    """State of every run in the queue of a study's folder, in the order in which they are taken; [] without a queue.

    For a page about the study, which changes nothing and holds nothing: `state` is finished, failed (`why`), running
    (`worker`: host and process; `since`) or waiting. A run that begins with a failed one has failed. Progress within a
    running one is in its run folder, `study / entry.run` (`dsv3.reporting.overview`). See also `seconds_left`.

    Raises:
        ValueError: a file of the queue is not one, which the message names.
    """
    return Queue(study).states()


def seconds_left(study: Path, runs: Sequence[QueuedRun], now: float) -> float | None:
    """Until all runs have ended, if those that run now have as many workers to the end; None: nothing tells the speed.

    By the mean seconds of training per token of finished runs, of which the largest may take longer.
    """
    done = [RunFolder(study / run.entry.run).summary() or {} for run in runs if run.state == "finished"]
    tokens = sum(summary.get("tokens", 0) for summary in done)
    running = [run for run in runs if run.state == "running"]
    if not tokens or not running:
        return None
    per_token = sum(summary.get("seconds", 0.0) for summary in done) / tokens
    left = sum(run.entry.tokens for run in runs if run.state == "waiting") * per_token
    left += sum(max(0.0, run.entry.tokens * per_token - (now - (run.since or now))) for run in running)
    return left / len(running)


class Queue:
    """The queue of one study. It reads the files anew at each call."""

    def __init__(self, study: Path) -> None:
        self.study = study
        self.folder = study / QUEUE
        self.seen: dict[Path, tuple[float, float]] = {}  # claim -> when it was touched, and when that was first seen

    def write(self, entries: Sequence[Entry], *, retry: bool) -> None:
        """Add runs, or replace what the queue says of them. retry: those that failed are to be tried again."""
        for entry in entries:
            text = text_of(entry._asdict()) + "\n"
            write_text_atomically(self.folder / f"{entry.name}.json", text)
            if retry:
                self.retry(entry)

    def retry(self, entry: Entry) -> None:
        """Forget that the run failed, and how many workers died over it."""
        dead = [claim for claim in self._claims().get(entry.name, []) if not self._lives(claim)]
        for path in [*dead, self.folder / f"{entry.name}.failed"]:
            path.unlink(missing_ok=True)

    def entries(self) -> list[Entry]:
        """In their order.

        Raises:
            ValueError: a file is not an entry.
        """
        return sorted(
            (_read(path) for path in self.folder.glob("*.json")), key=lambda entry: (entry.number, entry.name)
        )

    def entry(self, run: str) -> Entry | None:
        """That of a run folder within the study; None: the queue does not have it."""
        path = self.folder / f"{name_of(run)}.json"
        return _read(path) if path.exists() else None

    def states(self) -> list[QueuedRun]:
        entries, claims = self.entries(), self._claims()
        runs = {entry.run: self._state(entry, claims.get(entry.name, [])) for entry in entries}
        for entry in entries:  # a run stands behind the one that it begins with
            before = runs.get(entry.after or "")
            if before is not None and before.state == "failed" and runs[entry.run].state == "waiting":
                runs[entry.run] = QueuedRun(entry, "failed", why=f"it begins with {entry.after}, which failed")
        return list(runs.values())

    def ready(self) -> list[Entry]:
        """Waiting runs whose beginning is there, in the order in which they are to be taken."""
        runs = self.states()
        unfinished = {run.entry.run for run in runs if run.state != "finished"}
        return [run.entry for run in runs if run.state == "waiting" and run.entry.after not in unfinished]

    @contextlib.contextmanager
    def claimed(self, entry: Entry) -> Iterator[bool]:
        """Whether the run is this process's within the block; not where it is another's, or has ended meanwhile.

        The claim is given back at the end of the block, unless this process dies in it.
        """
        claims = self._claims().get(entry.name, [])
        if self._state(entry, claims).state != "waiting":
            yield False
            return
        number = 1 + max((_number(claim) for claim in claims), default=0)
        claim = self.folder / f"{entry.name}.claim-{number}"
        file = _claim(claim)
        try:
            if file is None or self._state(entry, []).state != "waiting":  # it ended while the claims were read
                yield False
                return
            with _heartbeat(claim):
                yield True
        finally:
            if file is not None:
                claim.unlink(missing_ok=True)
                file.close()

    @contextlib.contextmanager
    def growing(self) -> Iterator[None]:
        """Workers stay until the end of the block though all runs have ended: this process may add more."""
        for claim in self._growing():
            if not self._lives(claim):
                claim.unlink(missing_ok=True)
        claim = self.folder / f"{MORE}-{uuid.uuid4().hex}.claim-1"
        file = _claim(claim)
        assert file is not None, "no other process has this name"
        try:
            with _heartbeat(claim):
                yield
        finally:
            claim.unlink(missing_ok=True)
            file.close()

    def grows(self) -> bool:
        """Whether a process that lives may add runs."""
        return any(self._lives(claim) for claim in self._growing())

    def _growing(self) -> Iterator[Path]:
        return self.folder.glob(f"{MORE}-*.claim-1")

    def fail(self, entry: Entry, why: str) -> None:
        write_text_atomically(self.folder / f"{entry.name}.failed", f"{why}\n")

    def _claims(self) -> dict[str, list[Path]]:
        """Claims of every run."""
        found: dict[str, list[Path]] = {}
        for path in self.folder.glob("*.claim-*"):
            found.setdefault(path.name.rpartition(".claim-")[0], []).append(path)
        return found

    def _state(self, entry: Entry, claims: Sequence[Path]) -> QueuedRun:
        if (why := _text(self.folder / f"{entry.name}.failed")) is not None:
            return QueuedRun(entry, "failed", why=why.strip())
        if RunFolder(self.study / entry.run).summary_path.exists():
            return QueuedRun(entry, "finished")
        newest = max(claims, key=_number, default=None)
        if newest is not None and self._lives(newest):
            about = _about(newest)
            return QueuedRun(entry, "running", str(about.get("worker")), _seconds(about.get("since")))
        if len(claims) >= MOST_DEATHS:
            return QueuedRun(entry, "failed", why=f"{len(claims)} workers died over it")
        if is_held(self.study / entry.run):  # by a command that knows no queue, or by what a dead worker left behind
            return QueuedRun(entry, "running")
        return QueuedRun(entry, "waiting")

    def _lives(self, claim: Path) -> bool:
        """Whether its worker does. Of another machine's, by this one's clock alone: since when it was not touched."""
        try:
            touched = claim.stat().st_mtime
        except FileNotFoundError:
            return False
        if _about(claim).get("kernel") == _kernel():
            return _is_locked(claim)
        before, first_seen = self.seen.get(claim, (None, 0.0))
        if before != touched:
            # A clock that goes wrong on either side moves nobody's claim, but a claim that was old at first sight by
            # far more than clocks differ needs no further wait.
            first_seen = time.monotonic() - (STALE if time.time() - touched > 10 * STALE else 0)
            self.seen[claim] = (touched, first_seen)
        return time.monotonic() - first_seen < STALE


def name_of(run: str) -> str:
    """The name of a run's files: it follows from its folder, so that a run has one entry, whoever writes it."""
    digest = hashlib.blake2b(run.encode(), digest_size=4).hexdigest()
    return f"{re.sub(r'[^A-Za-z0-9_=+-]+', '-', run)[:80]}-{digest}"


def _read(path: Path) -> Entry:
    """Checks what it reads: the folder may be anyone's.

    Raises:
        ValueError: it is not the file of a run.
    """
    try:
        entry = Entry(**json.loads(_text(path) or ""))
        places = [place for place in (entry.run, entry.after) if place is not None]
        fits = entry.name == path.stem and isinstance(entry.number, int)
        fits &= isinstance(entry.tokens, int) and entry.tokens >= 0
        fits &= all(isinstance(place, str) and _is_within(place) for place in places)
        fits &= isinstance(entry.overrides, list) and all(isinstance(override, str) for override in entry.overrides)
    except (ValueError, TypeError, RecursionError):
        fits = False
    if not fits:
        raise ValueError(f"{path}: not the file of a run; the command that began the study writes it again")
    return entry


def _is_within(place: str) -> bool:
    """Whether a relative path leads nowhere but further in."""
    path = Path(place)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in place


def _claim(claim: Path) -> IO[str] | None:
    """Make the claim, locked and complete at its first moment; None: another worker was faster."""
    number, name = tempfile.mkstemp(prefix=f".{claim.name}.", suffix=".tmp", dir=claim.parent)
    file = os.fdopen(number, "w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
        worker = f"{socket.gethostname()}, process {os.getpid()}"
        json.dump({"worker": worker, "kernel": _kernel(), "since": time.time()}, file)
        file.flush()
        os.fsync(file.fileno())
        os.link(name, claim)
    except FileExistsError:
        file.close()
        return None
    except BaseException:
        file.close()
        raise
    finally:
        os.unlink(name)
    return file


@contextlib.contextmanager
def _heartbeat(claim: Path) -> Iterator[None]:
    """Touch the claim every HEARTBEAT seconds within the block. A worker that slept until another took the run over is
    interrupted, as by SIGTERM."""
    next_one = claim.with_name(f"{claim.name.rpartition('-')[0]}-{_number(claim) + 1}")
    ended = threading.Event()

    def beat() -> None:
        while not ended.wait(HEARTBEAT):
            with contextlib.suppress(OSError):  # the file system may be away for a moment
                if next_one.exists():
                    os.kill(os.getpid(), signal.SIGTERM)
                    return
                os.utime(claim)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _is_locked(claim: Path) -> bool:
    try:
        file = os.open(claim, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def _kernel() -> str:
    """The same in all processes that see each other's locks: of one machine since it was started."""
    return _text(Path("/proc/sys/kernel/random/boot_id")) or socket.gethostname()


def _about(claim: Path) -> dict[str, Any]:
    try:
        content = json.loads(_text(claim) or "")
    except (ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def _seconds(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


def _number(claim: Path) -> int:
    number = claim.name.rpartition(".claim-")[2]
    return int(number) if number.isdecimal() and len(number) < 10 else 0


def _text(path: Path) -> str | None:
    """None where there is no such file, and of a link or a pipe in its place."""
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return None
    with os.fdopen(file, errors="replace") as opened:
        return opened.read(MOST_BYTES)
