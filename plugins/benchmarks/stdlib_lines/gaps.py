"""Infilling of lines of the run's own held-out code."""

import hashlib
from collections.abc import Iterator
from typing import Any

from datasets import Dataset

SHORTEST = 12
"""Characters of a line, without its indentation, that tell enough to be asked for."""
BEFORE, AFTER = 700, 300
"""Characters, in whole lines, of the text on either side of the gap."""


def load(*, run: Any, domain: int, per_document: int, **_: Any) -> dict[str, Dataset]:
    """`prefix`, `middle`, `suffix`, of `per_document` lines of every held-out document of the run's domain, spread
    over the document; the first of every document come first."""
    documents = [list(gaps(text, per_document)) for text in run.documents(domain)]
    rows = [of_one[i] for i in range(per_document) for of_one in documents if i < len(of_one)]
    return {"test": Dataset.from_list(rows)}


def gaps(text: str, count: int) -> Iterator[dict[str, str]]:
    """`count` gaps at lines chosen by the hash of line and place, in the order of the hashes."""
    lines = text.splitlines(keepends=True)
    telling = [i for i, line in enumerate(lines) if is_telling(line)]
    for i in sorted(telling, key=lambda i: hashlib.sha256(f"{i} {lines[i]}".encode()).digest())[:count]:
        code = lines[i].strip()
        indent = lines[i][: len(lines[i]) - len(lines[i].lstrip())]
        ending = lines[i][len(lines[i].rstrip()) :]
        yield {
            "prefix": last_lines(lines[:i], BEFORE) + indent,
            "middle": code,
            "suffix": ending + first_lines(lines[i + 1 :], AFTER),
        }


def is_telling(line: str) -> bool:
    """Code, long enough, and no comment."""
    code = line.strip()
    return len(code) >= SHORTEST and not code.startswith(("#", '"', "'")) and any(mark in code for mark in "=(.:")


def last_lines(lines: list[str], characters: int) -> str:
    start = len(lines)
    while start and sum(map(len, lines[start - 1 :])) <= characters:
        start -= 1
    return "".join(lines[start:])


def first_lines(lines: list[str], characters: int) -> str:
    end = 0
    while end < len(lines) and sum(map(len, lines[: end + 1])) <= characters:
        end += 1
    return "".join(lines[:end])


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"exact_match": float(results[0].strip() == doc["middle"])}
