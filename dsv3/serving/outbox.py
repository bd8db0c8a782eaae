"""News on its way from the engine's thread to an event loop: one hand-over for all texts of a step.

Waking a loop, and then each client, costs more than a token's news, and the two threads share the interpreter's lock.
News of quick steps therefore waits for a moment that no reader sees, unless a text begins or ends.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

Wake = Callable[[], None]

PAUSE = 0.02
"""Seconds between two hand-overs that are not urgent. News waits for so long, and for the step that runs then."""


class Outbox:
    """Filled and sent by the engine's thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._full: dict[asyncio.AbstractEventLoop, dict[Wake, None]] = {}
        self._urgent = False
        self._sent = clock()

    def put(self, loop: asyncio.AbstractEventLoop, wake: Wake, *, urgent: bool) -> None:
        """`wake` is called once by the loop, however often it was put since the box was last sent."""
        self._full.setdefault(loop, {})[wake] = None
        self._urgent = self._urgent or urgent

    def send(self) -> None:
        """To be called after each step."""
        if not self._full:
            return
        if not self._urgent and self.clock() - self._sent < PAUSE:
            return
        full, self._full = self._full, {}
        self._urgent, self._sent = False, self.clock()
        for loop, wakes in full.items():
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(wake_all, list(wakes))


def wake_all(wakes: list[Wake]) -> None:
    for wake in wakes:
        wake()
