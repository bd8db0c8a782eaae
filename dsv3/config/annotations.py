"""Type check of a value against an annotation, both read from files."""

import ast
from typing import Any

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
    items = inner.elts if isinstance(inner, ast.Tuple) else [inner]
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
    found = follow(module, name)
    if found and isinstance(found[1], ast.Assign):  # an alias, such as Order = Literal["psm", "spm"]
        return fits(found[1].value, value, found[0])
    return None


def _any(verdicts: list[bool | None]) -> bool | None:
    return True if True in verdicts else None if None in verdicts else False


def _all(verdicts: list[bool | None]) -> bool | None:
    return False if False in verdicts else None if None in verdicts else True


def _name(node: ast.expr) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""


def _is_ellipsis(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is ...


def words(annotation: ast.expr) -> str:
    """The annotation for a reader: "an integer or null"."""
    if isinstance(annotation, ast.BinOp):
        return f"{words(annotation.left)} or {words(annotation.right)}"
    text = ast.unparse(annotation)
    if isinstance(annotation, ast.Subscript) and (name := _name(annotation.value)) in _LISTS | _MAPPINGS:
        return f"a {'list' if name in _LISTS else 'mapping'} ({text})"
    return _WORDS.get(text, text)


def literals(annotation: ast.expr, module: Module) -> list[Any]:
    """The values that a Literal, or an alias of one, allows; empty for any other annotation."""
    if isinstance(annotation, ast.Subscript) and _name(annotation.value) == "Literal":
        items = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        return [ast.literal_eval(item) for item in items]
    if isinstance(annotation, ast.BinOp):
        return literals(annotation.left, module) + literals(annotation.right, module)
    found = follow(module, annotation.id) if isinstance(annotation, ast.Name) else None
    return literals(found[1].value, found[0]) if found and isinstance(found[1], ast.Assign) else []
