"""News on its way from the engine's thread to an event loop: one hand-over for all texts of a step.

Waking a loop costs more than telling it of a token, and the two threads then share the interpreter's lock.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress

Wake = Callable[[], None]


class Outbox:
    """Filled and sent by the engine's thread."""

    def __init__(self) -> None:
        self._full: dict[asyncio.AbstractEventLoop, dict[Wake, None]] = {}

    def put(self, loop: asyncio.AbstractEventLoop, wake: Wake) -> None:
        """`wake` is called once by the loop, however often it was put since the box was last sent."""
        self._full.setdefault(loop, {})[wake] = None

    def send(self) -> None:
        full, self._full = self._full, {}
        for loop, wakes in full.items():
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(wake_all, list(wakes))


def wake_all(wakes: list[Wake]) -> None:
    for wake in wakes:
        wake()
