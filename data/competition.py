"""Competition problems to train on: the templates of the benchmark `competition` with parameters of training alone."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from data.example_sources import ExampleRow, ExampleSource
from data.generated import conversation_row
from dsv3.bounds import NonNegativeInt, PositiveFloat, PositiveInt
from dsv3.verifiers.competition import LEVELS, TEMPLATES, drawn

VERSION = 1
"""Raised with every change of the code that draws other problems from the same settings."""

ASKED = "Problem: {problem}\nGive the answer, a whole number, in \\boxed{{}}.\nSolution:"
"""As in plugins/benchmarks/competition."""


def conversations(
    *, levels: Sequence[int], each: PositiveInt, seed: NonNegativeInt, weight: PositiveFloat
) -> ExampleSource:
    r"""Problems, answered by the answer in `\boxed{}`. `each`: problems of every template of these levels.

    Raises:
        ValueError: there is no such level.
    """

    def row(problem: str, answer: int, family: str) -> dict[str, Any]:
        return conversation_row(problem, rf"\boxed{{{answer}}}", family=family)

    return _source(row, levels=levels, each=each, seed=seed, weight=weight)


def prompts(*, levels: Sequence[int], each: PositiveInt, seed: NonNegativeInt, weight: PositiveFloat) -> ExampleSource:
    """The same problems as prompts for the reward `boxed_integer`.

    Their answers are integers, not texts: held-out rows are not scored by exact match, which no boxed answer passes.
    """

    def row(problem: str, answer: int, family: str) -> dict[str, Any]:
        return {"prompt": problem, "answer": answer, "family": family, "verifier": "boxed_integer"}

    return _source(row, levels=levels, each=each, seed=seed, weight=weight)


def _source(row: Any, *, levels: Sequence[int], each: int, seed: int, weight: float) -> ExampleSource:
    if not levels or not set(levels) <= set(LEVELS):
        raise ValueError(f"levels={list(levels)}: must be among {', '.join(map(str, LEVELS))}")

    def identity() -> Mapping[str, Any]:
        return {
            "version": VERSION,
            "templates": [t.text for t in TEMPLATES],
            "levels": list(levels),
            "each": each,
            "seed": seed,
        }

    def rows() -> Iterator[ExampleRow]:
        chosen = [template for template in TEMPLATES if template.level in levels]
        for each_drawn in drawn(chosen, "train", each=each, seed=seed):
            asked = ASKED.format(problem=each_drawn.problem)
            yield ExampleRow(each_drawn.template, row(asked, each_drawn.answer, each_drawn.template))

    return ExampleSource(weight=weight, identity=identity, rows=rows)
