"""math-verify (github.com/huggingface/Math-Verify), as a service of the sandbox."""

from typing import Any

import sympy.parsing.sympy_parser
from math_verify import parse, verify

from dsv3.verifiers import grammar


def answer(request: tuple[str, str]) -> dict[str, Any]:
    """Whether the answer means the same as the target."""
    text, target = request
    grammar.begin(target)
    same = bool(verify(parse(target), parse(text)))
    if grammar.refusals:
        return {"value": 0.0, "reason": grammar.refusals[0]}
    return {"value": float(same), "reason": ""}


sympy_parser: Any = sympy.parsing.sympy_parser
sympy_parser.eval = grammar.guarded
