"""Does a schedule keep to `dsv3.contracts.Schedule`?"""

import math
from collections.abc import Callable
from typing import Any

from dsv3.testing.requirement import require

POINTS = 64


def check_schedule(factory: Callable[[], Any], *, total_tokens: int) -> None:
    """Raise AssertionError, saying what is wrong, unless `factory()` is a schedule that the core can use.

    total_tokens: the length of the run that the factory was given.
    """
    schedule = factory()
    require(callable(schedule), f"a schedule is called with a number of tokens; {schedule!r} is no function")
    asked = sorted({*range(0, total_tokens, max(1, total_tokens // POINTS)), 1, total_tokens - 1, total_tokens})
    asked.append(2 * total_tokens)  # the last step may end past the budget
    values = {}
    for tokens in asked:
        value = values[tokens] = schedule(tokens)
        require(
            isinstance(value, int | float) and math.isfinite(value) and value >= 0,
            f"the value after {tokens} tokens must be a finite number, at least 0; not {value!r}",
        )
    for tokens in reversed(asked):
        require(
            schedule(tokens) == values[tokens],
            f"asked again after {tokens} tokens, in another order, the schedule gives {schedule(tokens)} instead of "
            f"{values[tokens]}: it must be a function of the tokens alone, without state",
        )
    fresh = factory()
    for tokens in asked[len(asked) // 2 :]:
        require(
            fresh(tokens) == values[tokens],
            f"a new schedule, as a resumed run makes one, gives {fresh(tokens)} after {tokens} tokens instead of "
            f"{values[tokens]}: it must not depend on what it was asked before",
        )
