"""Texts under way for one request: jobs at a scheduler, and their news in the order in which they come."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from dsv3.inference.sampling import Settings, choice_of
from dsv3.serving.outbox import Outbox
from dsv3.serving.recorder import Grammar, Likelihood, Recorder, likelihoods
from dsv3.serving.scheduler import Job, News
from dsv3.serving.served_model import Served

Experts = list[list[int]]
"""Of one token: the chosen experts of each layer."""


class Piece(NamedTuple):
    """What came of an answer."""

    answer: "Answer"
    start: int  # its ids are those from here on
    text: str


@dataclass
class Answer:
    """One text of a request."""

    index: int
    job: Job
    recorder: Recorder
    shown_prompt: str  # what `echo` gives before the text
    ids: list[int] = field(default_factory=list)
    text: str = ""
    end: str | None = None
    arrived: deque[News] = field(default_factory=deque)  # filled by the engine's thread
    begun: bool = False  # whether anything has arrived
    read: list[Likelihood | None] = field(default_factory=list)  # of the prompt's tokens, where these are asked for

    def written(self, start: int, end: int) -> list[Likelihood]:
        """Of tokens start to end of the text."""
        return self.recorder.likelihoods[start:end]

    def experts_of(self, start: int, end: int) -> list[Experts]:
        """The experts that wrote these tokens: those of the position before each."""
        record = self.job.row.experts if self.job.row is not None else None
        first = len(self.job.prompt) - 1
        layers = record.by_layer.values() if record is not None else ()
        return [[positions[first + place] for positions in layers] for place in range(start, end)]

    def take(self) -> Piece:
        """Add what has arrived."""
        start, text = len(self.ids), ""
        while self.arrived:
            news = self.arrived.popleft()
            self.ids += news.ids
            text += news.text
            self.end = news.end
        self.text += text
        return Piece(self, start, text)

    def watch(self, logits_TV: Tensor) -> None:
        """Called by the engine's thread with the logits of the prompt's positions."""
        best = self.recorder.best or 0
        first = len(self.read)  # the logits at a position are those of the token after it
        following = self.job.prompt[first : first + len(logits_TV)]
        self.read += likelihoods(logits_TV[: len(following)], following, best) if following else []


class Answers:
    """All texts of one request. Whoever submits them must `cancel` in the end: that ends what still runs."""

    def __init__(
        self,
        served: Served,
        account: str,
        *,
        seconds: float,
        streams: bool,
        outbox: Outbox,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        """`streams`: there is news of every step, not of ends alone. `loop`: where it is awaited."""
        self.served, self.account, self.seconds, self.streams = served, account, seconds, streams
        self.answers: list[Answer] = []
        self._outbox, self._loop, self._changed = outbox, loop, asyncio.Event()

    def add(
        self,
        prompt: list[int],
        settings: Settings,
        *,
        best: int | None = None,
        grammar: Grammar | None = None,
        reads: bool = False,
        experts: bool = False,
        shown_prompt: str = "",
    ) -> None:
        """`reads`: note the prompt's log-probabilities; `experts`: note those of each token."""
        recorder = Recorder(choice_of(settings), best=best, grammar=grammar)
        job = Job(self.account, prompt, settings, lambda news: self._deliver(answer, news), recorder)
        job.seconds, job.experts = self.seconds, experts and self.served.experts > 0
        answer = Answer(len(self.answers), job, recorder, shown_prompt)
        if reads:
            answer.read.append(None)  # nothing comes before the first token
            job.watch = answer.watch
        self.answers.append(answer)

    def _deliver(self, answer: Answer, news: News) -> None:
        """Called by the engine's thread."""
        answer.arrived.append(news)
        if self.streams or news.end is not None:
            urgent = news.end is not None or not answer.begun
            self._outbox.put(self._loop, self._changed.set, urgent=urgent)
        answer.begun = True

    def submit(self) -> None:
        """Raises BusyError, RuntimeError: as the scheduler says; then none is left waiting."""
        try:
            for answer in self.answers:
                self.served.scheduler.submit(answer.job)
        except BaseException:
            self.cancel()
            raise

    def cancel(self) -> None:
        for answer in self.answers:
            if answer.end is None:
                self.served.scheduler.cancel(answer.job)

    @property
    def tokens(self) -> int:
        """Read and written so far."""
        return sum(len(answer.job.row.tokens) for answer in self.answers if answer.job.row is not None)

    async def news(self) -> AsyncIterator[list[Piece]]:
        """What comes until all have ended; it is in its `Answer` already."""
        running = self.answers
        while running:
            await self._changed.wait()
            self._changed.clear()
            if pieces := [answer.take() for answer in running if answer.arrived]:
                yield pieces
            running = [answer for answer in running if answer.end is None]
