"""Reads an answer to CRUXEval without executing any of it. Runs next to the test, in the sandbox."""

import ast
from typing import Any


def arguments(answer: str) -> tuple[list[Any], dict[str | None, Any]]:
    """Arguments of `assert f(...) == ...`, of `f(...)`, or given bare.

    Raises:
        ValueError, SyntaxError: they are no literals, or something other than `f` is called.
    """
    call = _sides(answer)[0]
    if not _calls_f(call):
        call = ast.parse(f"f({answer})", mode="eval").body
    if not _calls_f(call):
        raise ValueError("no call of f")
    named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    return [ast.literal_eval(argument) for argument in call.args], named


def value(answer: str) -> Any:
    """The value on the right of `assert f(...) == ...`, or given bare.

    Raises:
        ValueError, SyntaxError: it is no literal.
    """
    return ast.literal_eval(_sides(answer)[-1] or answer)


def _sides(answer: str) -> tuple[Any, ...]:
    """Both sides of an asserted equation, or a single expression; (None,) where the answer is neither."""
    try:
        (statement,) = ast.parse(answer.strip()).body
    except (SyntaxError, ValueError):
        return (None,)
    match statement:
        case ast.Assert(test=ast.Compare(left=left, ops=[ast.Eq()], comparators=[right])) if _calls_f(left):
            return left, right
        case ast.Expr(value=expression):
            return (expression,)
    return (None,)


def _calls_f(node: Any) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "f"
