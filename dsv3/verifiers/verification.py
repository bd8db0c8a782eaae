"""Verifying an answer: sent to the service that scores it, which a hostile answer may end."""

import functools
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dsv3.sandbox import Service, ServiceError
from dsv3.sandbox.jail import installed

LONGEST_ANSWER = 20_000
"""Characters. The longest right answers, grids, have a fifth of it."""
LONGEST_FORMULA = 500
"""Characters. Longer ones are seldom answers, and often keep the parser busy until its time is up."""
REASONING = "dsv3.verifiers.reasoning_gym_service"
MATHEMATICS = "dsv3.verifiers.math_service"
TASKS = "dsv3.verifiers.task_service"

log = logging.getLogger(__name__)


class Score(NamedTuple):
    value: float  # between 0 and 1
    reason: str = ""  # why an answer was refused, or what it did to its verifier


def verify(family: str, answer: str, entry: Mapping[str, Any], settings: Mapping[str, Any] | None = None) -> Score:
    """Score an answer to a question of reasoning-gym. One that is the reference to the letter needs no verifier.

    Args:
        family: the generator's name, such as `simple_integration`.
        answer: what a model wrote. It is parsed in the service alone.
        entry: the question as the generator made it.
        settings: of the generator, where they are not its defaults.
    """
    if answer == entry["answer"]:
        return Score(1.0)
    return _score(REASONING, answer, (family, dict(settings or {}), answer, dict(entry)))


def same_value(answer: str, target: str) -> Score:
    """1 where math-verify finds that answer and target, numbers or expressions, mean the same."""
    return _score(MATHEMATICS, answer, (answer, target, False))


def same_formula(answer: str, target: str) -> Score:
    """1 where math-verify finds that two formulas in LaTeX mean the same. `$` around one changes nothing.

    Each is read as a whole: `same_value` looks for the last number or formula in a text, so that `24 or 25` is 25.
    """
    return _score(MATHEMATICS, answer, (answer, target, True), longest=LONGEST_FORMULA)


def load_task_scoring(file: Path, function: str) -> None:
    """Import a scoring function of an installed package where `score_task` will call it.

    Raises:
        ValueError: it cannot be imported there.
    """
    try:
        _service(TASKS, os.getpid()).ask((_below_installed(file), function, None, None))
    except ServiceError as error:
        raise ValueError(f"{file.name} cannot be imported in the sandbox") from error


def score_task(file: Path, function: str, doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """What the scoring function of a task makes of the results, by metric; nothing where they are refused."""
    return _ask(TASKS, (_below_installed(file), function, dict(doc), list(results))).get("values", {})


def _below_installed(file: Path) -> str:
    for folder in installed():
        if file.is_relative_to(folder):
            return str(file.relative_to(folder))
    raise ValueError(f"{file} is not part of an installed package")


def _score(module: str, answer: str, request: Any, longest: int = LONGEST_ANSWER) -> Score:
    if len(answer) > longest:
        return Score(0.0, f"longer than {longest} characters")
    reply = _ask(module, request)
    return Score(float(reply.get("value", 0.0)), str(reply["reason"]))


def _ask(module: str, request: Any) -> dict[str, Any]:
    """The service's reply; a reason alone where the request was its end."""
    try:
        return _service(module, os.getpid()).ask(request)
    except ServiceError as error:
        log.warning("an answer scores 0: %s", error)
        return {"reason": str(error)}


@functools.cache
def _service(module: str, process: int) -> Service:
    """One for each process: a forked one must not write into its parent's pipe."""
    return Service(module)
