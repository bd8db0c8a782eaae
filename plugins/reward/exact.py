"""Exact match with the row's `answer`, white space around either apart."""

from collections.abc import Sequence

from dsv3.contracts import Answer
from plugins.reward.base import Judge, field


class Exact(Judge):
    """1 where the text is the row's `answer`."""

    reads = ("answer",)

    def judge(self, answers: Sequence[Answer]) -> list[float]:
        return [float(answer.text.strip() == str(field(answer, "answer")).strip()) for answer in answers]
