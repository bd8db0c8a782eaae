"""A reward of one's own: the last line of an answer. Lives outside the project."""

from collections.abc import Sequence
from typing import Annotated

from dsv3.bounds import Between
from dsv3.contracts import Answer


class LastLine:
    """1 where the last line is the row's `answer`, so that a model may reason above it.

    longest: lines that an answer may have; longer ones earn 0.
    """

    def __init__(self, *, longest: Annotated[int, Between(1, 1000)]) -> None:
        self.longest = longest

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        return [self._value(answer) if answer.ended else 0.0 for answer in answers]

    def _value(self, answer: Answer) -> float:
        lines = answer.text.strip().split("\n")
        return float(len(lines) <= self.longest and lines[-1] == str(answer.item["answer"]))
