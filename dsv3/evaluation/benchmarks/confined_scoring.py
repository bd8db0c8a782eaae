"""Tasks of lm-eval whose scoring parses what the model wrote as mathematics: their scoring runs in the sandbox."""

import inspect
import re
from pathlib import Path
from typing import Any

from dsv3.verifiers import load_task_scoring, score_task

PARSERS = re.compile(r"^\s*(?:from|import)\s+(?:sympy|math_verify|latex2sympy2)", re.MULTILINE)
"""Imports of libraries that evaluate an answer, or do not come to an end with it."""


def confine_scoring(task: Any) -> None:
    """Have a service call the task's `process_results`, if files next to it import such a library.

    Every metric of an answer that is refused, or that ends the service, is 0.

    Raises:
        ValueError: the service cannot import the function.
    """
    scoring = task.config.process_results
    if task.OUTPUT_TYPE != "generate_until" or not inspect.isfunction(scoring):
        return
    file = Path(inspect.getfile(scoring))
    if not any(PARSERS.search(path.read_text(encoding="utf-8")) for path in file.parent.glob("*.py")):
        return
    load_task_scoring(file, scoring.__name__)
    nothing = {metric["metric"]: 0.0 for metric in task.config.metric_list}

    def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
        return nothing | score_task(file, scoring.__name__, doc, results)

    task.config.process_results = process_results
