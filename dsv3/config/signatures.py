"""Reads what a `_target_` accepts from its source by `ast`: nothing is imported."""

import ast
import functools
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from dsv3.config.problems import did_you_mean


@dataclass(frozen=True)
class Module:
    """A source file, and the dotted name it is imported under."""

    name: str
    path: Path

    @property
    def tree(self) -> ast.Module:
        return _parse(self.path)

    def names(self) -> dict[str, ast.stmt]:
        """Name -> statement at the top level that gives it; inside `if` and `try` too."""
        return _names(self.path)


@dataclass(frozen=True)
class Argument:
    annotation: ast.expr | None
    required: bool


@dataclass(frozen=True)
class Signature:
    """Arguments by name. `open`: any further name is accepted, or cannot be ruled out."""

    module: Module
    arguments: dict[str, Argument]
    open: bool


class NotFoundError(LookupError):
    """A `_target_` that is not there or cannot be read; the message says what is."""


@cache
def _parse(path: Path) -> ast.Module:
    try:
        return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))
    except SyntaxError as error:
        raise NotFoundError(f"{path}, line {error.lineno}, is not Python: {error.msg}") from error


@cache
def _names(path: Path) -> dict[str, ast.stmt]:
    return {name: statement for statement in _statements(_parse(path).body) for name in _bound(statement)}


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for statement in body:
        if isinstance(statement, ast.If):
            yield from _statements(statement.body + statement.orelse)
        elif isinstance(statement, ast.Try):
            yield from _statements(statement.body + [s for h in statement.handlers for s in h.body])
        else:
            yield statement


def _bound(statement: ast.stmt) -> list[str]:
    match statement:
        case ast.ClassDef(name=name) | ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
            return [name]
        case ast.Assign(targets=targets):
            return [target.id for target in targets if isinstance(target, ast.Name)]
        case ast.AnnAssign(target=ast.Name(id=name)):
            return [name]
        case ast.Import(names=names) | ast.ImportFrom(names=names):
            return [alias.asname or alias.name.partition(".")[0] for alias in names]
    return []


def is_library(package: str) -> bool:
    """Whether a top-level package is installed or of the standard library, so that it is taken on trust."""
    spec = _spec(package)
    if spec is None:
        return False
    if spec.origin in ("built-in", "frozen"):
        return True
    places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or [])
    return any(Path(place).is_relative_to(library) for place in places for library in _libraries())


@functools.cache
def _libraries() -> list[Path]:
    return [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")]


def _spec(package: str):  # type: ignore[no-untyped-def]
    try:
        return find_spec(package)
    except ValueError:  # e.g. __main__, which has no spec
        return None


def find_module(dotted: str) -> tuple[Module, list[str]]:
    """The longest prefix of `dotted` that is a module's file, and the names left over (at least one).

    Raises:
        NotFoundError: there is no such package or module, or nothing is named in it.
    """
    package, *names = dotted.split(".")
    spec = _spec(package)
    if spec is None:
        raise NotFoundError(f"there is no package {package!r} here or on PYTHONPATH")
    folders = [Path(place) for place in spec.submodule_search_locations or []]
    file = Path(spec.origin) if spec.origin else None
    while names and (step := _step(folders, names[0])):
        package = f"{package}.{names.pop(0)}"
        folders, file = step
    module = Module(package, file) if file else None
    if not names:
        defined = f"; {_defined(module)}" if module else ""
        raise NotFoundError(f"this is a module: name a class or a function in it{defined}")
    if module is None or (len(names) > 1 and names[0] not in module.names()):
        inside = {path.stem for folder in folders for path in folder.iterdir() if path.suffix == ".py" or path.is_dir()}
        near = did_you_mean(names[0], [name for name in inside if not name.startswith("_")])
        raise NotFoundError(f"there is no module {names[0]!r} in {package}.{near}")
    return module, names


def _step(folders: list[Path], name: str) -> tuple[list[Path], Path | None] | None:
    """The folders and the file of a submodule; None if there is none."""
    inner = [folder / name for folder in folders if (folder / name).is_dir()]
    files = [folder / "__init__.py" for folder in inner] + [folder / f"{name}.py" for folder in folders]
    file = next((file for file in files if file.is_file()), None)
    return (inner, file) if inner or file else None


def _defined(module: Module) -> str:
    kinds = (ast.ClassDef, ast.FunctionDef)
    names = [s.name for s in _statements(module.tree.body) if isinstance(s, kinds) and not s.name.startswith("_")]
    return f"{module.path} defines {', '.join(names) or 'none'}"


def signature(dotted: str) -> Signature:
    """What the class or function named by `dotted` accepts.

    Raises:
        NotFoundError: there is no such module, or no such name in it.
    """
    module, names = find_module(dotted)
    if names[0] not in module.names():
        raise NotFoundError(f"there is no {names[0]!r}: {_defined(module)}")
    found = follow(module, names[0])
    if found is None:
        return Signature(module, {}, open=True)
    module, statement = found
    for name in names[1:]:
        method = _member(statement, name)
        if method is None:
            return Signature(module, {}, open=True)
        statement = method
    if isinstance(statement, ast.ClassDef):
        return _of_class(module, statement)
    if isinstance(statement, ast.FunctionDef):
        return _of_function(module, statement, bound=len(names) > 1)
    return Signature(module, {}, open=True)


@cache
def follow(module: Module, name: str) -> tuple[Module, ast.stmt] | None:
    """The statement that defines a name, through `from x import name`; None where that leads into a library."""
    statement = module.names().get(name)
    if isinstance(statement, ast.ImportFrom):
        source = _import_source(module, statement)
        alias = next(a for a in statement.names if (a.asname or a.name) == name)
        if is_library(source.partition(".")[0]):
            return None
        try:
            other, names = find_module(f"{source}.{alias.name}")
        except NotFoundError:
            return None
        return follow(other, names[0]) if len(names) == 1 else None
    return (module, statement) if statement is not None else None


def _import_source(module: Module, statement: ast.ImportFrom) -> str:
    if not statement.level:
        return statement.module or ""
    package = module.name.split(".")
    keep = len(package) - statement.level + (module.path.name == "__init__.py")
    return ".".join([*package[:keep], *([statement.module] if statement.module else [])])


def _member(statement: ast.stmt, name: str) -> ast.FunctionDef | None:
    body = statement.body if isinstance(statement, ast.ClassDef) else []
    return next((s for s in body if isinstance(s, ast.FunctionDef) and s.name == name), None)


def _of_class(module: Module, statement: ast.ClassDef) -> Signature:
    if (init := _member(statement, "__init__")) is not None:
        return _of_function(module, init, bound=True)
    bases = [base.id if isinstance(base, ast.Name) else None for base in statement.bases]
    decorators = {node.id for d in statement.decorator_list for node in ast.walk(d) if isinstance(node, ast.Name)}
    if "NamedTuple" in bases or ("dataclass" in decorators and not bases):
        return Signature(module, _fields(statement), open=False)
    if decorators or None in bases or _member(statement, "__new__") or statement.keywords:
        return Signature(module, {}, open=True)
    for base in bases:
        found = follow(module, base) if base else None
        if found is None or not isinstance(found[1], ast.ClassDef):
            return Signature(module, {}, open=True)
        inherited = _of_class(found[0], found[1])
        if inherited.arguments or inherited.open:
            return inherited
    return Signature(module, {}, open=False)


def _fields(statement: ast.ClassDef) -> dict[str, Argument]:
    return {
        field.target.id: Argument(field.annotation, required=field.value is None)
        for field in statement.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
    }


def _of_function(module: Module, function: ast.FunctionDef, *, bound: bool) -> Signature:
    """`bound`: the first argument is `self` or `cls`."""
    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in function.decorator_list)
    spec = function.args
    positional = [*spec.posonlyargs, *spec.args]
    without_default = len(positional) - len(spec.defaults)
    arguments = {a.arg: Argument(a.annotation, i < without_default) for i, a in enumerate(positional)}
    if bound and not static and positional:
        del arguments[positional[0].arg]
    for argument, default in zip(spec.kwonlyargs, spec.kw_defaults, strict=True):
        arguments[argument.arg] = Argument(argument.annotation, required=default is None)
    return Signature(module, arguments, open=spec.kwarg is not None)
