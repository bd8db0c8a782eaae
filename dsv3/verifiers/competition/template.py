"""Templates of problems, the split of their parameters, and drawing problems."""

import hashlib
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

Split = Literal["train", "test"]
Parameters = dict[str, int]

LEVELS = (1, 2, 3)
LARGEST = 999
TEST_SHARE = 4
"""One in so many problems of a template is for the test."""
ATTEMPTS = 200
"""Draws for each problem wanted, after which a template is taken to have no more."""


@dataclass(frozen=True)
class Template:
    """A kind of problem.

    `draw` gives parameters; None where they make no problem. `text` is formatted with them. `answer` is exact.
    """

    name: str
    field: str
    level: int  # 1: one step; 2: a known theorem; 3: several steps
    text: str
    draw: Callable[[random.Random], Parameters | None]
    answer: Callable[..., int]


class Problem(NamedTuple):
    template: str
    field: str
    level: int
    problem: str
    answer: int


def split_of(problem: str) -> Split:
    """Which split a problem belongs to, by its text alone."""
    return "test" if hashlib.sha256(problem.encode()).digest()[0] % TEST_SHARE == 0 else "train"


def drawn(templates: Sequence[Template], split: Split, *, each: int, seed: int = 0) -> Iterator[Problem]:
    """At most `each` distinct problems of every template, from one split, template after template."""
    for template in templates:
        draws = random.Random(f"{seed} {template.name}")
        found: set[str] = set()
        for _ in range(ATTEMPTS * each):
            if len(found) == each:
                break
            parameters = template.draw(draws)
            if parameters is None:
                continue
            problem, answer = template.text.format(**parameters), template.answer(**parameters)
            if 0 <= answer <= LARGEST and problem not in found and split_of(problem) == split:
                found.add(problem)
                yield Problem(template.name, template.field, template.level, problem, answer)
