"""Answer grammar: the expressions in an answer that may be evaluated.

Libraries evaluate answers: sympy's parser ends in `eval`, and so do several verifiers of reasoning-gym. `guarded` is
such an `eval` for them. It admits numbers, text, lists, names, arithmetic and elementary functions; no attribute, no
other call, and no tower of powers, which would not end.
"""

import ast
import builtins
import re
from collections.abc import Iterator
from typing import Any

FUNCTIONS = frozenset({
    "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "acot", "asec", "acsc", "sinh", "cosh", "tanh",
    "asinh", "acosh", "atanh", "exp", "log", "ln", "sqrt", "cbrt", "root", "Abs", "sign", "floor", "ceiling",
    "factorial", "erf", "Ei", "Si", "Ci", "Li", "li", "Rational", "Integer", "Float", "Symbol", "Add", "Mul", "Pow",
})  # fmt: skip
"""Of sympy. Symbol, Integer, Float, Add, Mul and Pow are what its parser writes for names, numbers and operators."""

LARGEST_EXPONENT = 1000

_NODES = (
    ast.Expression, ast.Constant, ast.Name, ast.Load, ast.Call, ast.keyword, ast.List, ast.Tuple, ast.Dict, ast.UnaryOp,
    ast.BinOp, ast.unaryop, ast.operator,
)  # fmt: skip


class RefusedError(ValueError):
    """An expression that this grammar does not admit."""


refusals: list[str] = []
"""Why expressions were refused, since `begin`: verifiers swallow exceptions."""
_called_by_reference: set[str] = set()


def begin(reference: str) -> None:
    """Forget earlier refusals; functions that the reference answer calls are admitted too."""
    refusals.clear()
    _called_by_reference.clear()
    _called_by_reference.update(re.findall(r"([A-Za-z]\w*)\(", reference))


def admit(text: str) -> ast.Expression:
    """The syntax tree of an expression that may be evaluated.

    Raises:
        RefusedError: it is more than the grammar admits.
        SyntaxError: it is no expression.
    """
    if "#" in text:
        raise RefusedError("a comment")  # a verifier that counts the numbers of an answer would count those in it
    tree = ast.parse(text.strip(), mode="eval")
    for node in ast.walk(tree):
        if not isinstance(node, _NODES):
            raise RefusedError(f"{type(node).__name__} is no part of an answer")
        if isinstance(node, ast.Name) and node.id.startswith("_"):
            raise RefusedError(f"the name {node.id}")
        if isinstance(node, ast.Call):
            _admit_call(node)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            _admit_exponent(node.right)
    return tree


def _admit_call(call: ast.Call) -> None:
    name = call.func.id if isinstance(call.func, ast.Name) else ""
    if name not in FUNCTIONS | _called_by_reference:
        raise RefusedError(f"a call of {name or 'an expression'}")
    if name == "Pow" and len(call.args) == 2:
        _admit_exponent(call.args[1])


def _admit_exponent(exponent: ast.expr) -> None:
    """A number must be moderate; with a symbol in it, it is not computed."""
    nodes = list(ast.walk(exponent))
    if any(name not in FUNCTIONS for name in _names(nodes)):
        return
    powers = any(isinstance(node, ast.Pow) for node in nodes) or "Pow" in _names(nodes)
    numbers = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, int | float)]
    if powers or any(abs(number) > LARGEST_EXPONENT for number in numbers):
        raise RefusedError("a power too large")


def _names(nodes: list[ast.AST]) -> Iterator[str]:
    """Names, and symbols as sympy's parser writes them: `Symbol("x")`."""
    for node in nodes:
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield repr(node.value)


def guarded(text: Any, names: dict[str, Any] | None = None, variables: Any = None) -> Any:
    """`eval` of an admitted expression, with the names given and no others."""
    try:
        tree = admit(text)
    except RefusedError as error:
        refusals.append(str(error))
        raise
    return builtins.eval(compile(tree, "answer", "eval"), (names or {}) | {"__builtins__": {}}, variables)
