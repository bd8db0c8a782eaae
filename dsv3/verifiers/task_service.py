"""Scoring functions of lm-eval's own tasks that parse answers, as a service of the sandbox."""

import functools
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dsv3.verifiers import grammar


@functools.cache
def _function(file: str, name: str) -> Callable[[Any, Any], dict[str, Any]]:
    """`file`: relative to the folder that its package is installed in."""
    path = next(path for root in sys.path if (path := Path(root, file)).is_file())
    sys.path.append(str(path.parent))  # such files import each other by name
    spec = importlib.util.spec_from_file_location("task_functions", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def answer(request: tuple[str, str, Any, Any]) -> dict[str, Any]:
    """`values` by metric. A request without a document only loads the function."""
    file, name, doc, results = request
    function = _function(file, name)
    grammar.begin("")
    values = function(doc, results) if doc else {}
    return {"values": {} if grammar.refusals else values, "reason": "; ".join(grammar.refusals[:1])}


grammar.guard_sympy()
