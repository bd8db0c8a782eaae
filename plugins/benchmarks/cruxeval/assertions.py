"""CRUXEval (arXiv 2401.03065): complete an assertion about a function, with its result or with arguments that give it.

lm-eval's own tasks run what the model wrote outside any sandbox; these have its description and examples, and run
nothing but the model's literal (output) or the function on the model's arguments (input), in the sandbox.
"""

import functools
import importlib.util
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset

ASSERTION = re.compile(r"assert\s+f\((.*)\)\s*==\s*(.+)", re.DOTALL)


@functools.cache
def folder() -> Path:
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the package lm_eval is missing")
    return Path(next(iter(spec.submodule_search_locations)), "tasks", "cruxeval")


class _Loader(yaml.SafeLoader):
    """Reads lm-eval's YAML without calling the functions that it names."""


_Loader.add_constructor("!function", lambda loader, node: None)


def described(kind: str, dataset: Dataset) -> Dataset:
    settings = yaml.load((folder() / f"{kind}.yaml").read_text(encoding="utf-8"), Loader=_Loader)
    return dataset.map(lambda _: {"description": settings["description"]})


input_docs = functools.partial(described, "cruxeval_input")
output_docs = functools.partial(described, "cruxeval_output")


def examples(kind: str) -> list[dict[str, str]]:
    spec = importlib.util.spec_from_file_location("cruxeval_of_lm_eval", folder() / "utils.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, f"list_fewshot_samples_{kind}")()


input_examples = functools.partial(examples, "input")
output_examples = functools.partial(examples, "output")


def parts(response: str) -> tuple[str, str]:
    """Arguments and result of the assertion in a response; a bare answer counts as either."""
    text = response.split("[/ANSWER]")[0].rpartition("[ANSWER]")[2].strip()
    found = ASSERTION.search(text)
    return (found[1].strip(), found[2].strip()) if found else (text, text)


def output_program(doc: dict[str, Any], response: str) -> dict[str, str]:
    """The literal alone: without the function at hand it cannot be worked out by calling it."""
    return {
        "code": f"def answer():\n    return ({parts(response)[1]}\n)",
        "test": f"def check(answer):\n    assert answer() == ({doc['output']})",
        "entry_point": "answer",
    }


def input_program(doc: dict[str, Any], response: str) -> dict[str, str]:
    return {
        "code": f"{doc['code']}\n\ndef answer():\n    return f({parts(response)[0]}\n)",
        "test": f"def check(answer):\n    assert answer() == ({doc['output']})",
        "entry_point": "answer",
    }


def programs(
    make: Callable[[dict[str, Any], str], dict[str, str]],
    responses: Sequence[Sequence[str]],
    docs: Sequence[dict[str, Any]],
) -> list[list[dict[str, str]]]:
    return [[make(doc, response) for response in group] for group, doc in zip(responses, docs, strict=True)]


input_programs = functools.partial(programs, input_program)
output_programs = functools.partial(programs, output_program)


def score(doc: dict[str, Any], results: list[list[dict[str, Any]]]) -> dict[str, float]:
    """The share of samples that are right, which is pass@1."""
    passed = [verdict["passed"] for verdict in results[0]]
    return {"pass@1": sum(passed) / len(passed)}
