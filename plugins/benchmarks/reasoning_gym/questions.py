"""Questions drawn from reasoning-gym's generators (arXiv 2505.24760), and its own verifiers, run in a jail.

A question's seed lies above all that training and its held-out questions are drawn from, and follows from the task
alone, so every run is asked the same.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import reasoning_gym
from datasets import Dataset

from dsv3.verifiers import verify

FIRST_SEED = 2_000_000_000
"""data/sources.py draws below 2 * 10**9."""


@functools.cache
def drawn(generator: str, size: int) -> Any:
    return reasoning_gym.create_dataset(generator, seed=FIRST_SEED, size=size)


def load(*, generators: Sequence[str], size: int, **_: Any) -> dict[str, Dataset]:
    """`size` questions of each generator in turn, so that the first few hold as many of each."""
    columns = [
        [
            {
                "family": generator,
                "number": number,
                "size": size,
                "question": entry["question"].strip(),
                "answer": str(entry["answer"]),
            }
            for number, entry in enumerate(drawn(generator, size))
        ]
        for generator in generators
    ]
    return {"test": Dataset.from_list(list(itertools.chain.from_iterable(zip(*columns, strict=True))))}


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """`score`: the verifier's, between 0 and 1; `exact_match`: 1 where the answer is right altogether."""
    answer, family = results[0].strip(), doc["family"]
    value = verify(family, answer, drawn(family, doc["size"])[doc["number"]]).value if answer else 0.0
    return {"score": value, "exact_match": float(value == 1.0)}
