"""reasoning-gym's own verifiers, without partial credit."""

from collections.abc import Sequence

from dsv3.contracts import Answer
from dsv3.verifiers import verify
from plugins.reward.base import Judge, field


class ReasoningGym(Judge):
    """1 where the verifier of the row's `family` gives full marks.

    The row has `entry`, the question as the generator made it, and may have `settings` of the generator. Part marks
    would reward answers that list everything: many verifiers give len(answer) / len(text) where the text contains it.
    """

    reads = ("family", "entry")

    def judge(self, answers: Sequence[Answer]) -> list[float]:
        return [float(self._score(answer) == 1.0) for answer in answers]

    def _score(self, answer: Answer) -> float:
        family, entry = field(answer, "family"), field(answer, "entry")
        return verify(family, answer.text.strip(), entry, answer.item.get("settings")).value
