"""Answer grammar: the expressions in an answer that may be evaluated.

Libraries evaluate answers: sympy's parser ends in `eval`, and so do several verifiers of reasoning-gym. `guarded` is
such an `eval` for them, and `guard_sympy` puts it there. It admits numbers, text, lists, names, arithmetic and
elementary functions; no attribute, no other call, and no tower of powers, which would not end.
"""

import ast
import builtins
import re
from collections.abc import Iterator
from typing import Any

import sympy
import sympy.parsing.sympy_parser

FUNCTIONS = frozenset({
    "sin", "cos", "tan", "cot", "sec", "csc", "asin", "acos", "atan", "acot", "asec", "acsc", "sinh", "cosh", "tanh",
    "asinh", "acosh", "atanh", "exp", "log", "ln", "sqrt", "cbrt", "root", "Abs", "sign", "floor", "ceiling",
    "factorial", "erf", "Ei", "Si", "Ci", "Li", "li", "Rational", "Integer", "Float", "Symbol", "Add", "Mul", "Pow",
})  # fmt: skip
"""Of sympy. Symbol, Integer, Float, Add, Mul and Pow are what its parser writes for names, numbers and operators."""

LARGEST_EXPONENT = 1000

_PARTS: dict[type[ast.AST], tuple[str, ...]] = {
    ast.Expression: ("body",), ast.Constant: (), ast.Name: (), ast.Call: ("func", "args", "keywords"),
    ast.keyword: ("value",), ast.List: ("elts",), ast.Tuple: ("elts",), ast.Dict: ("keys", "values"),
    ast.UnaryOp: ("operand",), ast.BinOp: ("left", "right"),
}  # fmt: skip
"""Nodes of a syntax tree that are admitted -> the fields that hold others. Every operator is admitted."""


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


def admit(expression: str | ast.Expression) -> ast.Expression:
    """The syntax tree of an expression that may be evaluated.

    Raises:
        RefusedError: it is more than the grammar admits.
        SyntaxError: it is no expression.
    """
    tree = expression if isinstance(expression, ast.Expression) else _parsed(expression)
    for node in _nodes(tree):
        kind = type(node)
        if kind not in _PARTS:
            raise RefusedError(f"{kind.__name__} is no part of an answer")
        if kind is ast.Name and node.id.startswith("_"):
            raise RefusedError(f"the name {node.id}")
        if kind is ast.Call:
            _admit_call(node)
        elif kind is ast.BinOp and type(node.op) is ast.Pow:
            _admit_exponent(node.right)
    return tree


def _parsed(text: str) -> ast.Expression:
    if "#" in text:
        raise RefusedError("a comment")  # a verifier that counts the numbers of an answer would count those in it
    return ast.parse(text.strip(), mode="eval")


def _nodes(tree: ast.AST) -> Iterator[Any]:
    """Nodes, each before those that it holds: half the time of `ast.walk`, which looks at every field."""
    waiting: list[Any] = [tree]
    while waiting:
        node = waiting.pop()
        yield node
        for name in _PARTS.get(type(node), ()):
            part = getattr(node, name)
            if type(part) is list:
                waiting += part
            else:
                waiting.append(part)


def _admit_call(call: ast.Call) -> None:
    name = call.func.id if isinstance(call.func, ast.Name) else ""
    if name not in FUNCTIONS and name not in _called_by_reference:
        raise RefusedError(f"a call of {name or 'an expression'}")
    if name == "Pow" and len(call.args) == 2:
        _admit_exponent(call.args[1])


def _admit_exponent(exponent: ast.expr) -> None:
    """A number must be moderate; with a symbol in it, it is not computed."""
    nodes = list(_nodes(exponent))
    if any(name not in FUNCTIONS for name in _names(nodes)):
        return
    powers = any(isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow) for node in nodes)
    numbers = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, int | float)]
    if powers or "Pow" in _names(nodes) or any(abs(number) > LARGEST_EXPONENT for number in numbers):
        raise RefusedError("a power too large")


def _names(nodes: list[ast.AST]) -> Iterator[str]:
    """Names, and symbols as sympy's parser writes them: `Symbol("x")`."""
    for node in nodes:
        if isinstance(node, ast.Name):
            yield node.id
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield repr(node.value)


def guarded(expression: Any, names: dict[str, Any] | None = None, variables: Any = None) -> Any:
    """`eval` of an admitted expression, with the names given and no others."""
    try:
        tree = admit(expression)
    except RefusedError as error:
        refusals.append(str(error))
        raise
    return builtins.eval(compile(tree, "answer", "eval"), (names or {}) | {"__builtins__": {}}, variables)


_of_sympy = {name: getattr(sympy, name) for name in sympy.__all__}


def _names_of_sympy(statement: str, names: dict[str, Any]) -> None:
    """`exec` for sympy's parser, which imports all names of sympy for each expression that it reads."""
    if statement != "from sympy import *":
        raise RefusedError("a statement")
    names.update(_of_sympy)


def guard_sympy() -> None:
    """From here on sympy's parser evaluates what the grammar admits, and nothing else."""
    parser: Any = sympy.parsing.sympy_parser
    parser.eval = guarded
    parser.compile = lambda tree, *_: tree  # `evaluate=False` compiles a tree of its own, which `guarded` has to see
    parser.exec = _names_of_sympy
