"""Type and range check of a value against an annotation, both read from files."""

import ast
from collections.abc import Iterator
from typing import Any

from dsv3.bounds import Above, AtLeast, Between
from dsv3.config.signatures import Module, follow

_SCALARS: dict[str, tuple[type, ...]] = {
    "int": (int,),
    "float": (int, float),
    "bool": (bool,),
    "str": (str,),
    "Path": (str,),
    "PathLike": (str,),
}
_LISTS = {"list", "List", "Sequence", "Iterable", "Collection", "tuple", "Tuple", "set", "frozenset"}
_MAPPINGS = {"dict", "Dict", "Mapping", "MutableMapping", "DictConfig"}
_WORDS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a text",
    "Path": "a path",
    "None": "null",
}


def fits(annotation: ast.expr, value: Any, module: Module) -> bool | None:
    """True or False where it can be told, otherwise None. A mapping with `_target_` stands for what it builds."""
    match annotation:
        case ast.Constant(value=None):
            return value is None
        case ast.Constant(value=str(text)):
            return fits(ast.parse(text, mode="eval").body, value, module)
        case ast.BinOp(op=ast.BitOr(), left=left, right=right):
            return _any([fits(left, value, module), fits(right, value, module)])
        case ast.Subscript(value=base, slice=inner):
            return _fits_generic(_name(base), inner, value, module)
        case ast.Name() | ast.Attribute():
            return _fits_name(_name(annotation), value, module)
    return None


def _fits_generic(name: str, inner: ast.expr, value: Any, module: Module) -> bool | None:
    items = _items(inner)
    if name == "Literal":
        return value in [ast.literal_eval(item) for item in items]
    if name == "Union":
        return _any([fits(item, value, module) for item in items])
    if name == "Optional":
        return value is None or fits(inner, value, module)
    if name in ("Annotated", "Final"):
        return fits(items[0], value, module)
    whole = _fits_name(name, value, module)
    if name not in _LISTS or not whole:
        return whole
    if name not in ("tuple", "Tuple") or (len(items) == 2 and _is_ellipsis(items[1])):
        return _all([fits(items[0], element, module) for element in value])
    return len(items) == len(value) and _all([fits(i, v, module) for i, v in zip(items, value, strict=True)])


def _fits_name(name: str, value: Any, module: Module) -> bool | None:
    built = isinstance(value, dict) and "_target_" in value
    if name in _SCALARS:
        if isinstance(value, bool) and name != "bool":
            return False
        return isinstance(value, _SCALARS[name])
    if name in _LISTS:
        return isinstance(value, list | tuple) or (None if built else False)
    if name in _MAPPINGS:
        return isinstance(value, dict)
    alias = _alias(name, module)
    return fits(alias[0], value, alias[1]) if alias else None


def out_of_range(annotation: ast.expr, value: Any, module: Module) -> str | None:
    """What must hold of a value that fits the annotation's type, where its `dsv3.bounds` do not hold."""
    match annotation:
        case ast.BinOp(op=ast.BitOr(), left=left, right=right):
            side = left if fits(left, value, module) else right
            return out_of_range(side, value, module)
        case ast.Subscript(value=base, slice=ast.Tuple(elts=[inner, *ranges])) if _name(base) == "Annotated":
            number = isinstance(value, int | float) and not isinstance(value, bool)
            found = [_range(node).problem(value) for node in ranges if number and _named(node) in _RANGES]
            return next(filter(None, found), None) or out_of_range(inner, value, module)
        case ast.Subscript(value=base, slice=inner) if _name(base) in _LISTS and isinstance(value, list | tuple):
            kinds = [node for node in _items(inner) if not _is_ellipsis(node)]
            of_each = kinds if len(kinds) == len(value) else [kinds[0]] * len(value)
            found = [out_of_range(kind, element, module) for kind, element in zip(of_each, value, strict=True)]
            return next(filter(None, found), None)
        case ast.Name(id=name) if (alias := _alias(name, module)) is not None:
            return out_of_range(alias[0], value, alias[1])
    return None


def arguments_of(annotation: ast.expr, value: Any, module: Module) -> Iterator[tuple[str, str]]:
    """Mappings in `value` whose keys are the arguments of a class: (where in it, "" for itself, the class's name)."""
    match annotation:
        case ast.BinOp(op=ast.BitOr(), left=left, right=right):
            yield from arguments_of(left, value, module)
            yield from arguments_of(right, value, module)
        case ast.Subscript(value=base, slice=ast.Tuple(elts=[_, *notes])) if _name(base) == "Annotated":
            for note in notes:
                if isinstance(note, ast.Call) and _named(note) == "ArgumentsOf" and isinstance(value, dict):
                    yield "", _name(note.args[0])
        case ast.Subscript(value=base, slice=inner) if _name(base) in _LISTS and isinstance(value, list | tuple):
            for place, element in enumerate(value):
                for _, kind in arguments_of(_items(inner)[0], element, module):
                    yield f".{place}", kind
        case ast.Subscript(value=base, slice=ast.Tuple(elts=[_, inner])) if _name(base) in _MAPPINGS:
            for name, element in value.items() if isinstance(value, dict) else ():
                for _, kind in arguments_of(inner, element, module):
                    yield f".{name}", kind


_RANGES = {"Between": Between, "AtLeast": AtLeast, "Above": Above}


def _range(node: ast.expr) -> Between | AtLeast | Above:
    assert isinstance(node, ast.Call)
    return _RANGES[_named(node)](*(ast.literal_eval(argument) for argument in node.args))


def _named(node: ast.expr) -> str:
    return _name(node.func) if isinstance(node, ast.Call) else ""


def _items(inner: ast.expr) -> list[ast.expr]:
    return inner.elts if isinstance(inner, ast.Tuple) else [inner]


def _alias(name: str, module: Module) -> tuple[ast.expr, Module] | None:
    """What `name = ...` stands for, such as `Order = Literal["psm", "spm"]`, and where."""
    found = follow(module, name)
    return (found[1].value, found[0]) if found and isinstance(found[1], ast.Assign) else None


def _any(verdicts: list[bool | None]) -> bool | None:
    return True if True in verdicts else None if None in verdicts else False


def _all(verdicts: list[bool | None]) -> bool | None:
    return False if False in verdicts else None if None in verdicts else True


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...


def words(annotation: ast.expr, module: Module) -> str:
    """The annotation for a reader: "an integer or null"."""
    if isinstance(annotation, ast.BinOp):
        return f"{words(annotation.left, module)} or {words(annotation.right, module)}"
    if isinstance(annotation, ast.Subscript) and _name(annotation.value) == "Annotated":
        return words(_items(annotation.slice)[0], module)
    if isinstance(annotation, ast.Name) and (alias := _alias(annotation.id, module)):
        return words(*alias)
    text = ast.unparse(annotation)
    if options := literals(annotation, module):
        return f"one of {', '.join(map(str, options))}"
    if isinstance(annotation, ast.Subscript) and _name(annotation.value) in _LISTS:
        return f"a list, each item {words(_items(annotation.slice)[0], module)}"
    if isinstance(annotation, ast.Subscript) and _name(annotation.value) in _MAPPINGS:
        return "a mapping"
    return _WORDS.get(text, text)


def literals(annotation: ast.expr, module: Module) -> list[Any]:
    """The values that a Literal, or an alias of one, allows; empty for any other annotation."""
    if isinstance(annotation, ast.Subscript) and _name(annotation.value) == "Literal":
        return [ast.literal_eval(item) for item in _items(annotation.slice)]
    if isinstance(annotation, ast.BinOp):
        return literals(annotation.left, module) + literals(annotation.right, module)
    alias = _alias(annotation.id, module) if isinstance(annotation, ast.Name) else None
    return literals(*alias) if alias else []
