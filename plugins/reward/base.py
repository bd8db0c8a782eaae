"""Rules that all shipped rewards have in common."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from dsv3.contracts import Answer


class Judge(ABC):
    """A reward of answers that ended and say something: all others earn 0, and `judge` is not asked about them."""

    reads: Sequence[str] = ()
    """Values that a row of the data must have."""

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        for answer in answers:
            for name in self.reads:
                field(answer, name)
        finished = [answer.ended and bool(answer.text.strip()) for answer in answers]
        judged = iter(self.judge([answer for answer, counts in zip(answers, finished, strict=True) if counts]))
        return [next(judged) if counts else 0.0 for counts in finished]

    @abstractmethod
    def judge(self, answers: Sequence[Answer]) -> list[float]:
        """A number for each, finite."""


def field(answer: Answer, name: str) -> Any:
    """A value of the row of data that an answer is to.

    Raises:
        ValueError: the row has no such value.
    """
    if name not in answer.item:
        raise ValueError(f"a row of the data lacks `{name}`, which its reward reads; it has {', '.join(answer.item)}")
    return answer.item[name]
