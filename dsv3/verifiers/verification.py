"""Verifying an answer: sent to the service that scores it, which a hostile answer may end."""

import functools
import logging
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from dsv3.sandbox import Service, ServiceError

LONGEST_ANSWER = 20_000
"""Characters. The longest right answers, grids, have a tenth of it."""

log = logging.getLogger(__name__)


class Score(NamedTuple):
    value: float  # between 0 and 1
    reason: str = ""  # why an answer was refused, or what it did to its verifier


def verify(family: str, answer: str, entry: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> Score:
    """Score an answer to a question of reasoning-gym.

    Args:
        family: the generator's name, such as `simple_integration`.
        answer: what a model wrote. It is parsed in the service alone.
        entry: the question as the generator made it.
        settings: of the generator, where they are not its defaults.
    """
    return _ask("dsv3.verifiers.reasoning_gym_service", answer, (family, dict(settings or {}), answer, dict(entry)))


def same_value(answer: str, target: str) -> Score:
    """1 where math-verify finds that answer and target, numbers or expressions, mean the same."""
    return _ask("dsv3.verifiers.math_service", answer, (answer, target))


def _ask(module: str, answer: str, request: Any) -> Score:
    if len(answer) > LONGEST_ANSWER:
        return Score(0.0, f"longer than {LONGEST_ANSWER} characters")
    try:
        reply = _service(module, os.getpid()).ask(request)
    except ServiceError as error:
        log.warning("an answer scores 0: %s: %.60r", error, answer)
        return Score(0.0, str(error))
    return Score(float(reply["value"]), str(reply["reason"]))


@functools.cache
def _service(module: str, process: int) -> Service:
    """One for each process: a forked one must not write into its parent's pipe."""
    return Service(module)
