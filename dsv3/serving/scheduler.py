"""Scheduler: which waiting texts join the engine, and when those that run are ended.

`submit` and `cancel` may be called from any thread. All else is done by the one thread that drives the engine
(`EngineThread`). Where a slot is free, the account with the fewest running texts is served next, and among equals the
one that has waited longest since its last turn.
"""

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol

from dsv3.inference.row import Event, Row, Watch
from dsv3.inference.sampling import Choice, Settings
from dsv3.inference.speculation import Speculation

Clock = Callable[[], float]
"""Seconds."""
End = Literal["eos", "stop", "length", "cancelled", "timeout", "failed"]


class TextEngine(Protocol):
    """What writes texts: `Engine`, or vLLM behind the same methods."""

    rows: dict[int, Row]
    speculation: Speculation

    @property
    def kept_positions(self) -> int:
        """Of finished texts."""

    def check(self) -> None:
        """Raises where it can write no more."""

    def add(
        self,
        prompt: Sequence[int],
        settings: Settings,
        *,
        choice: Choice | None = None,
        owner: str = "",
        watch: Watch | None = None,
        experts: bool = False,
    ) -> int: ...

    def cancel(self, row: int) -> None: ...

    def step(self) -> list[Event]: ...


class News(NamedTuple):
    """Of a text: what a step added, or its end."""

    ids: list[int]
    text: str
    end: End | None


@dataclass(eq=False)
class Job:
    """A text that was asked for."""

    account: str
    prompt: list[int]
    settings: Settings
    deliver: Callable[[News], None]  # called by the engine's thread; must not wait
    choice: Choice | None = None
    watch: Watch | None = None
    seconds: float = 600.0  # after which it is ended
    experts: bool = False  # whether its row records them
    asked: float = 0.0
    first: float | None = None  # when its first token came
    row: Row | None = None  # once it runs
    over: bool = False


class BusyError(Exception):
    """No room for another text now.

    Carries: `message`, `retry_after` in whole seconds.
    """

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclass
class Limits:
    """How many texts run, and wait, in all and of one account."""

    slots: int = 16
    account_slots: int = 8
    waiting: int = 256
    account_waiting: int = 64


@dataclass
class Counts:
    """Since the start."""

    prompt_tokens: int = 0
    written_tokens: int = 0
    copied_tokens: int = 0  # of prompts, taken from texts before
    refused: int = 0
    steps: int = 0
    ends: dict[str, int] = field(default_factory=dict)


class Scheduler:
    """Of one engine."""

    def __init__(
        self, engine: TextEngine, limits: Limits, *, wake: Callable[[], None], clock: Clock = time.monotonic
    ) -> None:
        """`wake`: called when there is something to do."""
        self.engine, self.limits, self.wake, self.clock = engine, limits, wake, clock
        self.counts = Counts()
        self.on_first: Callable[[float], None] = lambda seconds: None  # time to the first token
        self._lock = threading.Lock()
        self._waiting: OrderedDict[str, deque[Job]] = OrderedDict()  # by account, the one served last at the end
        self._cancelled: list[Job] = []
        self.running: dict[int, Job] = {}
        self._seconds_per_text = 1.0
        self._closed = False

    @property
    def waiting(self) -> int:
        return sum(map(len, list(self._waiting.values())))  # other threads read it

    def submit(self, job: Job) -> None:
        """Raises BusyError where too many wait already, RuntimeError where the engine is dead."""
        with self._lock:
            if self._closed:
                raise RuntimeError("the engine has stopped")
            own = self._waiting.get(job.account, deque())
            for held, most, who in (
                (self.waiting, self.limits.waiting, "the server"),
                (len(own), self.limits.account_waiting, "this account"),
            ):
                if held >= most:
                    self.counts.refused += 1
                    raise BusyError(f"{who} has {held} texts waiting, the most that may", self._retry_after())
            job.asked = self.clock()
            self._waiting.setdefault(job.account, own).append(job)
        self.wake()

    def cancel(self, job: Job) -> None:
        """End a text; it gets no more news unless it has ended already."""
        with self._lock:
            self._cancelled.append(job)
        self.wake()

    def _retry_after(self) -> int:
        rounds = self.waiting / max(1, self.limits.slots)
        return max(1, min(60, round(rounds * self._seconds_per_text)))

    # What follows is called by the engine's thread alone.

    def step(self) -> bool:
        """Let texts leave and join, and run the engine once; whether there was anything to do."""
        self.engine.check()
        self._leave()
        self._join()
        if not self.running:
            return False
        for event in self.engine.step():
            self._tell(event)
        self.counts.steps += 1
        return True

    def seconds_left(self) -> float | None:
        """Until the next waiting text runs out of time; None where none waits."""
        with self._lock:
            ends = [job.asked + job.seconds for jobs in self._waiting.values() for job in jobs]
        return max(0.0, min(ends) - self.clock()) if ends else None

    def fail(self) -> None:
        """End everything, since the engine is dead."""
        with self._lock:
            self._closed = True
            jobs = [job for waiting in self._waiting.values() for job in waiting]
            self._waiting.clear()
        for job in (*jobs, *self.running.values()):
            self._end(job, "failed")
        self.running.clear()

    def _leave(self) -> None:
        with self._lock:
            leaving: list[tuple[Job, End]] = [(job, "cancelled") for job in self._cancelled]
            self._cancelled.clear()
            everyone = [job for jobs in self._waiting.values() for job in jobs]
        now = self.clock()
        everyone += self.running.values()
        leaving += [(job, "timeout") for job in everyone if now - job.asked > job.seconds]
        for job, end in leaving:
            if job.over:
                continue
            if job.row is not None:
                self.engine.cancel(job.row.number)
                del self.running[job.row.number]
            else:
                self._forget(job)
            self._end(job, end)

    def _forget(self, job: Job) -> None:
        with self._lock:
            jobs = self._waiting.get(job.account, deque())
            if job in jobs:
                jobs.remove(job)
            if not jobs:
                self._waiting.pop(job.account, None)

    def _join(self) -> None:
        while len(self.running) < self.limits.slots and (job := self._next()) is not None:
            number = self.engine.add(
                job.prompt,
                job.settings,
                choice=job.choice,
                owner=job.account,
                watch=job.watch,
                experts=job.experts,
            )
            job.row = self.engine.rows[number]
            self.running[number] = job

    def _next(self) -> Job | None:
        with self._lock:
            running = dict.fromkeys(self._waiting, 0)
            for job in self.running.values():
                if job.account in running:
                    running[job.account] += 1
            allowed = [account for account in running if running[account] < self.limits.account_slots]
            if not allowed:
                return None
            account = min(allowed, key=running.__getitem__)
            job = self._waiting[account].popleft()
            self._waiting.move_to_end(account)
            if not self._waiting[account]:
                del self._waiting[account]
            return job

    def _tell(self, event: Event) -> None:
        job = self.running.get(event.row)
        if job is None:  # cancelled
            return
        if job.first is None:
            job.first = self.clock()
            self.on_first(job.first - job.asked)
        self.counts.written_tokens += len(event.ids)
        if event.finished is None:
            job.deliver(News(event.ids, event.text, None))
            return
        del self.running[event.row]
        self._seconds_per_text = 0.9 * self._seconds_per_text + 0.1 * (self.clock() - job.asked)
        self._end(job, event.finished, event)

    def _end(self, job: Job, end: End, event: Event | None = None) -> None:
        job.over = True
        if job.row is not None:
            self.counts.prompt_tokens += job.row.prompt
            self.counts.copied_tokens += job.row.copied
        self.counts.ends[end] = self.counts.ends.get(end, 0) + 1
        deliver, job.deliver = job.deliver, ignore  # who listens holds the job: the two would outlive their request
        job.watch = None
        deliver(News(event.ids, event.text, end) if event is not None else News([], "", end))


def ignore(news: News) -> None:
    """Nobody listens to a text that has ended."""
