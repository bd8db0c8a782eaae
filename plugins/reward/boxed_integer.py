r"""The integer in `\boxed{...}`, as in competition mathematics, against the row's `answer`."""

from collections.abc import Sequence

from dsv3.contracts import Answer
from dsv3.verifiers import boxed_integer
from plugins.reward.base import Judge, field


class BoxedInteger(Judge):
    r"""1 where `\boxed{...}` holds the row's `answer`, whatever is said around it.

    `025` is 25; `25.0`, `x=25` and boxes with different content earn 0.
    """

    reads = ("answer",)

    def judge(self, answers: Sequence[Answer]) -> list[float]:
        return [float(boxed_integer(answer.text) == _target(answer)) for answer in answers]


def _target(answer: Answer) -> int:
    target = field(answer, "answer")
    try:
        return int(target)
    except ValueError:
        raise ValueError(f"answer={target!r} of a row of the data: must be an integer for boxed_integer") from None
