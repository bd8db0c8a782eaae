"""reasoning-gym's verifiers (arXiv 2505.24760), as a service of the sandbox."""

import re
import sys
from collections.abc import Callable
from fractions import Fraction
from math import isclose
from typing import Any

import reasoning_gym
from reasoning_gym.factory import DATASETS

from dsv3.verifiers import grammar

Check = Callable[[str, Any], bool]


def written_in(characters: str) -> Check:
    return lambda text, entry: re.fullmatch(f"[{characters}]*", text.lower()) is not None


def with_the_numbers_given(text: str, entry: Any) -> bool:
    numbers = sorted(map(int, re.findall(r"\d+", text)))
    return numbers == sorted(entry["metadata"]["numbers"]) and written_in(r"\d\s+*/().-")(text, entry)


def with_numbers(count: int) -> Check:
    return lambda text, entry: len(re.findall(r"\d+(?:\.\d+)?", text)) == count


def word_for_word(text: str, entry: Any) -> bool:
    return text.lower().split() == entry["answer"].lower().split()


def no_more_words(text: str, entry: Any) -> bool:
    return len(text.split()) <= len(entry["answer"].split())


def no_more_items(text: str, entry: Any) -> bool:
    return text.count(",") <= entry["answer"].count(",")


def near_the_probability(text: str, entry: Any) -> bool:
    return isclose(Fraction(text.replace(",", "")), Fraction(entry["answer"]), abs_tol=1e-4)


MORE_CHECKS: dict[str, Check] = {
    "coin_flip": near_the_probability,  # `0` is a prefix of every probability
    "complex_arithmetic": written_in(r"\d\s+*().ij-"),  # `nan` is no further from a number than it may be
    "countdown": with_the_numbers_given,  # `E - E` is a zero that was not among them
    "fraction_simplification": with_numbers(2),  # here and below: the first of several answers counts
    "game_of_life_halting": lambda text, entry: text.strip() == str(entry["answer"]),  # any text counts as true
    "gsm_symbolic": with_numbers(1),
    "letter_jumble": word_for_word,
    "number_sorting": written_in(r"\d\s\[\],.'\"e+-"),  # `nan` again
    "puzzle24": with_the_numbers_given,  # any four numbers that make 24
    "spell_backward": word_for_word,
    "time_intervals": no_more_words,
    "word_sorting": no_more_items,
}
"""What a right answer must satisfy where the family's own verifier gives full marks to others."""


def guard_evaluation() -> None:
    """From here on reasoning-gym and sympy evaluate what the grammar admits, and nothing else."""
    grammar.guard_sympy()
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
        if value >= 1.0 and family in MORE_CHECKS and not MORE_CHECKS[family](text, entry):
            grammar.refusals.append("right by a gap in the verifier only")
    except MemoryError:
        raise  # the process may be left with too little
    except Exception as error:
        return {"value": 0.0, "reason": f"{type(error).__name__}: {error}"[:300]}
    if grammar.refusals:
        return {"value": 0.0, "reason": grammar.refusals[0]}
    return {"value": min(max(value, 0.0), 1.0) if value == value else 0.0, "reason": ""}


guard_evaluation()
