r"""Equality of formulas by math-verify, with the row's `answer`."""

from collections.abc import Sequence

from dsv3.contracts import Answer
from dsv3.verifiers import boxed, same_formula
from plugins.reward.base import Judge, field


class MathVerify(Judge):
    r"""1 where the answer, a formula in LaTeX, means the same as the row's `answer`.

    The answer is what `\boxed{...}` holds, or the whole text where there is no box. math-verify by itself takes the
    last number of any text, so that a list of numbers is right if it ends well.
    """

    reads = ("answer",)

    def judge(self, answers: Sequence[Answer]) -> list[float]:
        return [self._value(answer) for answer in answers]

    def _value(self, answer: Answer) -> float:
        formula = boxed(answer.text) if r"\boxed" in answer.text else answer.text
        return same_formula(formula, str(field(answer, "answer"))).value if formula else 0.0
