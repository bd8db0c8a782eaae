"""Rates: requests of an account in a minute, and failed log-ins of an address."""

import time
from collections import OrderedDict
from collections.abc import Callable

REMEMBERED = 10_000
"""Accounts or addresses; the one that was seen least recently is forgotten first."""
LONGEST_WAIT = 900.0


class Rate:
    """A token bucket for each key: `per_minute` at once, refilled evenly."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self.clock = per_minute, clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # requests left, and when

    def wait(self, key: str) -> int:
        """0 and one request less, or the whole seconds to wait for the next."""
        now = self.clock()
        left, then = self._left.pop(key, (float(self.per_minute), now))
        left = min(float(self.per_minute), left + (now - then) * self.per_minute / 60)
        seconds = 0 if left >= 1 else int((1 - left) * 60 / self.per_minute) + 1
        self._left[key] = (left if seconds else left - 1, now)
        while len(self._left) > REMEMBERED:
            self._left.popitem(last=False)
        return seconds


class Failures:
    """After `free` failures each further try of a key has to wait twice as long as the one before, up to 15 minutes.
    A key that tries nothing for that long is forgotten."""

    def __init__(self, free: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.free, self.clock = free, clock
        self._failed: OrderedDict[str, tuple[int, float]] = OrderedDict()  # how often, and when last

    def wait(self, key: str) -> int:
        """Whole seconds until the next try; 0: now."""
        count, last = self._known(key)
        if count < self.free:
            return 0
        left = last + min(LONGEST_WAIT, 2.0 ** min(20, count - self.free + 1)) - self.clock()
        return int(left) + 1 if left > 0 else 0

    def begin(self, key: str) -> None:
        """Counted when a try begins, so that tries at the same time do not all count as the first."""
        count, _ = self._known(key)
        self._failed.pop(key, None)
        self._failed[key] = (count + 1, self.clock())
        while len(self._failed) > REMEMBERED:
            self._failed.popitem(last=False)

    def succeeded(self, key: str) -> None:
        self._failed.pop(key, None)

    def _known(self, key: str) -> tuple[int, float]:
        count, last = self._failed.get(key, (0, 0.0))
        return (count, last) if self.clock() - last <= LONGEST_WAIT else (0, 0.0)
