"""Families of BIG-Bench Hard (arXiv 2210.09261) whose questions reasoning-gym can draw, in BBH's wording, with the
three worked questions and the description that lm-eval's `bbh_fewshot_*` tasks have.

docs/evaluation.md says which generator stands for which family, and how near it comes.
"""

import functools
import importlib.util
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import reasoning_gym
import yaml
from datasets import Dataset

FIRST_SEED = 2_100_000_000


class Asked(NamedTuple):
    input: str
    target: str


def words(entry: Any) -> Asked:
    listed = list(dict.fromkeys(word.lower() for word in entry["metadata"]["original_words"]))
    return Asked(f"Sort the following words alphabetically: List: {' '.join(listed)}", " ".join(sorted(listed)))


def arithmetic(entry: Any) -> Asked:
    expression = entry["metadata"]["expression"].replace("( ", "(").replace(" )", ")")
    return Asked(f"{expression} =", str(entry["answer"]))


def legs(entry: Any) -> Asked:
    question = entry["question"].strip().rpartition("Now, how many")[2]
    return Asked(f"How many{question}", str(entry["answer"]))


def syllogism(entry: Any) -> Asked:
    facts = entry["metadata"]
    argument = f'"{facts["premise1"]}. {facts["premise2"]}. It follows that: {facts["conclusion"]}."'
    options = "deductively valid or invalid?\nOptions:\n- valid\n- invalid"
    question = f"{argument}\nIs the argument, given the explicitly stated premises, {options}"
    return Asked(question, "valid" if facts["is_valid"] else "invalid")


def liars(entry: Any) -> Asked:
    story, who = entry["question"].partition(" So who is")[0], entry["metadata"]["names"][0]
    return Asked(f"Question: {story} Does {who} tell the truth?", "Yes" if entry["metadata"]["solution"][0] else "No")


class Family(NamedTuple):
    generator: str
    settings: dict[str, Any]
    ask: Callable[[Any], Asked]
    balanced: bool = False  # as many questions of each answer


ARITHMETIC = {"min_terms": 6, "max_terms": 8, "min_digits": 1, "max_digits": 1, "operators": ["+", "-", "*"]}
FAMILIES = {
    "word_sorting": Family("word_sorting", {"min_words": 3, "max_words": 8}, words),
    "multistep_arithmetic_two": Family("basic_arithmetic", ARITHMETIC, arithmetic),
    "object_counting": Family("leg_counting", {}, legs),
    "formal_fallacies": Family("syllogism", {}, syllogism, balanced=True),
    "web_of_lies": Family("knights_knaves", {}, liars, balanced=True),
}


def load(*, family: str, size: int, **_: Any) -> dict[str, Dataset]:
    """`size` questions: `input`, `target`, `description`."""
    chosen = FAMILIES[family]
    asked = questions(chosen)
    if chosen.balanced:
        asked = alternating(asked)
    description = published(family)["description"]
    rows = [question._asdict() | {"description": description} for question in itertools.islice(asked, size)]
    return {"test": Dataset.from_list(rows)}


def questions(family: Family) -> Iterator[Asked]:
    """Distinct questions without end."""
    seen: set[str] = set()
    for block in itertools.count():
        drawn = reasoning_gym.create_dataset(
            family.generator, seed=FIRST_SEED + 1000 * block, size=1000, **family.settings
        )
        for entry in drawn:
            question = family.ask(entry)
            if question.input not in seen:
                seen.add(question.input)
                yield question


def alternating(asked: Iterator[Asked]) -> Iterator[Asked]:
    """One question of each of the two answers in turn."""
    waiting: dict[str, list[Asked]] = {}
    for question in asked:
        waiting.setdefault(question.target, []).append(question)
        if len(waiting) == 2 and all(waiting.values()):
            yield from (queue.pop(0) for queue in waiting.values())


@functools.cache
def published(family: str) -> dict[str, Any]:
    """lm-eval's own description and worked questions of a family."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the package lm_eval is missing")
    path = Path(next(iter(spec.submodule_search_locations)), "tasks", "bbh", "fewshot", f"{family}.yaml")
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {"description": settings["description"], "samples": settings["fewshot_config"]["samples"]}


def shots(family: str) -> list[dict[str, str]]:
    return published(family)["samples"]


word_sorting = functools.partial(shots, "word_sorting")
multistep_arithmetic_two = functools.partial(shots, "multistep_arithmetic_two")
object_counting = functools.partial(shots, "object_counting")
formal_fallacies = functools.partial(shots, "formal_fallacies")
web_of_lies = functools.partial(shots, "web_of_lies")


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"exact_match": float(results[0].strip() == doc["target"])}
