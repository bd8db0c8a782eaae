"""News on its way from the engine's thread to an event loop: one hand-over for all texts of a step.

Waking a loop, and then each client, costs more than a token's news, and the two threads share the interpreter's lock.
News of a quick step therefore waits for the next one, unless a text begins or ends.
"""

import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

Wake = Callable[[], None]

PAUSE = 0.04
"""Seconds between two hand-overs that are not urgent; no news waits for more than one step."""


class Outbox:
    """Filled and sent by the engine's thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._full: dict[asyncio.AbstractEventLoop, dict[Wake, None]] = {}
        self._urgent = self._waited = False
        self._sent = clock()

    def put(self, loop: asyncio.AbstractEventLoop, wake: Wake, *, urgent: bool) -> None:
        """`wake` is called once by the loop, however often it was put since the box was last sent."""
        self._full.setdefault(loop, {})[wake] = None
        self._urgent = self._urgent or urgent

    def send(self) -> None:
        """To be called after each step."""
        if not self._full:
            return
        if not self._urgent and not self._waited and self.clock() - self._sent < PAUSE:
            self._waited = True
            return
        full, self._full = self._full, {}
        self._urgent, self._waited, self._sent = False, False, self.clock()
        for loop, wakes in full.items():
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(wake_all, list(wakes))


def wake_all(wakes: list[Wake]) -> None:
    for wake in wakes:
        wake()
