"""math-verify (github.com/huggingface/Math-Verify), as a service of the sandbox."""

import re
from typing import Any

from math_verify import LatexExtractionConfig, parse, verify

from dsv3.verifiers import grammar


def answer(request: tuple[str, str, bool]) -> dict[str, Any]:
    """Whether the answer means the same as the target. The third: both are formulas, and read as wholes."""
    text, target, whole = request
    grammar.begin(target)
    read = formula if whole else parse
    same = bool(verify(read(target), read(text)))
    if grammar.refusals:
        return {"value": 0.0, "reason": grammar.refusals[0]}
    return {"value": float(same), "reason": ""}


def formula(text: str) -> list[Any]:
    """What math-verify parses a formula to; nothing where there are several, or words around it."""
    text = text.strip()
    if wrapped := re.fullmatch(r"(\${1,2})([^$]*[^$\\])\1", text):
        text = wrapped[2]
    if re.search(r"(?<!\\)\$", text):
        return []
    return parse(f"${text}$", [LatexExtractionConfig()])


grammar.guard_sympy()
