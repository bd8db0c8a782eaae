"""reasoning-gym's verifiers (arXiv 2505.24760), as a service of the sandbox."""

import re
import sys
from typing import Any

import reasoning_gym
import sympy.parsing.sympy_parser
from reasoning_gym.factory import DATASETS

from dsv3.verifiers import grammar

ALPHABETS = {
    "complex_arithmetic": r"[\d\s+*().ij-]*",
    "countdown": r"[\d\s+*/().-]*",
    "number_sorting": r"[\d\s\[\],.'\"e+-]*",
    "puzzle24": r"[\d\s+*/().-]*",
}
"""Characters of a right answer, where a verifier alone takes more: `nan` is within any distance of a number, and
`E - E` is a zero that was not among the numbers given."""

EXACT = frozenset({"game_of_life_halting"})
"""Families with one right answer, whose verifier takes any text."""


def _could_be_right(family: str, text: str, entry: dict[str, Any]) -> bool:
    if family in EXACT:
        return text.strip() == str(entry["answer"])
    return re.fullmatch(ALPHABETS.get(family, r".*"), text.lower(), re.DOTALL) is not None


def guard_evaluation() -> None:
    """From here on reasoning-gym and sympy evaluate what the grammar admits, and nothing else."""
    sympy_parser: Any = sympy.parsing.sympy_parser
    sympy_parser.eval = grammar.guarded
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == reasoning_gym.__name__:
            vars(module)["eval"] = grammar.guarded


_datasets: dict[str, Any] = {}


def _dataset(family: str, settings: dict[str, Any]) -> Any:
    key = f"{family} {settings}"
    if key not in _datasets:
        kind, config = DATASETS[family]
        _datasets[key] = kind(config=config(**settings))
    return _datasets[key]


def answer(request: tuple[str, dict[str, Any], str, dict[str, Any]]) -> dict[str, Any]:
    """Score of an answer: family, settings of its generator, answer, the question's entry."""
    family, settings, text, entry = request
    grammar.begin(str(entry["answer"]))
    try:
        value = float(_dataset(family, settings).score_answer(text, entry))
    except MemoryError:
        raise  # the process may be left with too little
    except Exception as error:
        return {"value": 0.0, "reason": f"{type(error).__name__}: {error}"[:300]}
    if value == 1.0 and not _could_be_right(family, text, entry):
        grammar.refusals.append("no right answer is written so")
    if grammar.refusals:
        return {"value": 0.0, "reason": grammar.refusals[0]}
    return {"value": min(max(value, 0.0), 1.0) if value == value else 0.0, "reason": ""}


guard_evaluation()
