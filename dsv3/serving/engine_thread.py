"""The one thread that drives the engines."""

import logging
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack

from dsv3.serving.outbox import Outbox
from dsv3.serving.scheduler import Scheduler

LONGEST_SLEEP = 1.0
"""Seconds between two looks at texts that run out of time."""


class EngineThread:
    """Steps the schedulers in turn while there is something to do, and sleeps otherwise."""

    def __init__(self) -> None:
        self.outbox = Outbox()  # what the schedulers tell is sent after each step
        self.schedulers: list[Scheduler] = []
        self._steady: Sequence[AbstractContextManager[None]] = ()
        self._work = threading.Event()
        self._stopping = False
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def wake(self) -> None:
        self._work.set()

    def start(self, schedulers: Sequence[Scheduler], steady: Sequence[AbstractContextManager[None]]) -> None:
        """`steady`: entered by the thread for as long as it runs; within them the weights must not change."""
        self.schedulers, self._steady = list(schedulers), steady
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and self.failure is None

    def stop(self) -> None:
        """End all texts, and wait for the step that runs."""
        self._stopping = True
        self.wake()
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            with ExitStack() as stack:
                for steady in self._steady:
                    stack.enter_context(steady)
                while not self._stopping:
                    self._work.clear()
                    worked = list(map(self._step, self.schedulers))
                    if not any(worked):
                        left = [scheduler.seconds_left() for scheduler in self.schedulers]
                        self._work.wait(min([LONGEST_SLEEP, *(seconds for seconds in left if seconds is not None)]))
        except BaseException as error:
            self.failure = error
            logging.getLogger(__name__).exception("the engine has stopped: all requests are refused from now on")
        finally:
            for scheduler in self.schedulers:
                scheduler.fail()
            self.outbox.send()

    def _step(self, scheduler: Scheduler) -> bool:
        worked = scheduler.step()
        self.outbox.send()
        return worked
