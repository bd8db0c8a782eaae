"""Form of an answer, whatever it says."""

import re
from collections.abc import Sequence

from dsv3.contracts import Answer
from plugins.reward.base import Judge


class Format(Judge):
    """1 where the whole text matches.

    pattern: a regular expression of Python's `re`. Nested repeats can take very long on texts that do not match.
    """

    def __init__(self, *, pattern: str) -> None:
        try:
            self.pattern = re.compile(pattern)
        except re.error as error:
            raise ValueError(f"pattern={pattern}: must be a regular expression ({error})") from None

    def judge(self, answers: Sequence[Answer]) -> list[float]:
        return [float(self.pattern.fullmatch(answer.text) is not None) for answer in answers]
