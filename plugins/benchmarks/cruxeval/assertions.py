"""CRUXEval (arXiv 2401.03065): complete an assertion about a function, with its result or with arguments that give it.

lm-eval's own tasks run what the model wrote outside any sandbox; these have its description and examples, and run
nothing of it: an answer is read as literals (literals.py), and the dataset's own function is called with them.
"""

import functools
import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset


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


LITERALS = Path(__file__).with_name("literals.py").read_text(encoding="utf-8")


def stated(response: str) -> str:
    """The answer in a response, as a Python literal of its text."""
    return ascii(response.split("[/ANSWER]")[0].rpartition("[ANSWER]")[2].strip())


def output_program(doc: dict[str, Any], response: str) -> dict[str, str]:
    """No function is at hand: the value cannot be worked out by calling it."""
    return {"code": "", "setup": LITERALS, "test": f"assert value({stated(response)}) == ({doc['output']})"}


def input_program(doc: dict[str, Any], response: str) -> dict[str, str]:
    """The model writes arguments, and nothing that runs: `f` is the dataset's, and the test calls it."""
    return {
        "code": doc["code"],
        "setup": LITERALS,
        "test": f"def check(f):\n"
        f"    positional, named = arguments({stated(response)})\n"
        f"    assert f(*positional, **named) == ({doc['output']})",
        "entry_point": "f",
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
