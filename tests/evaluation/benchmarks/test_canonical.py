"""Canonical solutions score 100%, wrong ones 0%, on HumanEval and both infilling sets."""

from collections.abc import Sequence
from typing import Any

import pytest

from dsv3.sandbox import Program, Sandbox
from tests.evaluation.benchmarks.test_tasks import module

pytestmark = pytest.mark.skipif(Sandbox().refusal is not None, reason=str(Sandbox().refusal))

SAMPLE = 12  # problems of each set in the default tests


def sets() -> dict[str, tuple[Any, str, Sequence[dict[str, Any]]]]:
    """By name: the module that makes programs, the field of the right answer, the documents."""
    humaneval, infilling = module("humaneval/problems"), module("infilling/gaps")
    return {
        "humaneval": (humaneval, "canonical_solution", list(humaneval.load()["test"])),
        "single line": (infilling, "middle", list(infilling.load(multiple=False)["test"])),
        "multi line": (infilling, "middle", list(infilling.load(multiple=True)["test"])),
    }


def wrong(answer: str) -> str:
    """Instead of the answer one `yield`, as far in as its first line: a function that yields returns no result."""
    first = answer.split("\n")[0]
    return first[: len(first) - len(first.lstrip())] + "yield"


def shares(name: str, documents: Sequence[dict[str, Any]], make: Any, field: str) -> tuple[list[str], list[str]]:
    """Documents whose canonical solution fails, and whose wrong one passes."""
    sandbox = Sandbox()
    right = [[doc[field]] for doc in documents]
    broken = [[wrong(doc[field])] for doc in documents]
    failed, passed = [], []
    for responses, faults, expected in ((right, failed, True), (broken, passed, False)):
        programs = [Program(**fields) for (fields,) in make.programs(responses, documents)]
        for doc, verdict in zip(documents, sandbox.run(programs), strict=True):
            if verdict.passed != expected:
                faults.append(f"{name} {doc['task_id']}: {verdict.detail}")
    return failed, passed


@pytest.mark.parametrize("name", ["humaneval", "single line", "multi line"])
def test_a_sample_of_canonical_and_wrong_solutions(name: str) -> None:
    make, field, documents = sets()[name]
    chosen = documents[:: len(documents) // SAMPLE][:SAMPLE]
    assert shares(name, chosen, make, field) == ([], [])


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(("name", "count"), [("humaneval", 164), ("single line", 1033), ("multi line", 5815)])
def test_all_canonical_and_wrong_solutions(name: str, count: int) -> None:
    make, field, documents = sets()[name]
    assert len(documents) == count
    assert shares(name, documents, make, field) == ([], [])
