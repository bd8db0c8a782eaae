"""Weighted sum of rewards, such as a right answer and its form."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, NamedTuple

from dsv3.bounds import ArgumentsOf, PositiveFloat
from dsv3.contracts import Answer, Reward


class Term(NamedTuple):
    reward: Reward
    weight: PositiveFloat


class WeightedSum:
    """sum_i weight_i * reward_i.

    terms: name -> mapping with the keys `reward` and `weight`.
    """

    def __init__(self, *, terms: Mapping[str, Annotated[Mapping[str, Any], ArgumentsOf(Term)]]) -> None:
        if not terms:
            raise ValueError("terms={}: must have at least one term")
        self.terms = [Term(**term) for term in terms.values()]

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        weighted = [[term.weight * value for value in term.reward(answers)] for term in self.terms]
        return [sum(values) for values in zip(*weighted, strict=True)]
