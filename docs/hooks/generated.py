"""Pages of the site that are made from the project itself, so that they say what it does.

index, contributing, changes, conduct   the Markdown files of the root
components/<kind>                       contract, YAML and docstrings of every option of conf/<kind>/
reference/keys, evaluate_keys, tools    what --help prints
"""

import ast
import contextlib
import io
import re
from collections.abc import Iterator
from typing import Any

import yaml

from dsv3.cli import main
from dsv3.config.help_page import help_page, summary
from dsv3.paths import CONF, ROOT

OF_ROOT = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changes.md",
    "CODE_OF_CONDUCT.md": "conduct.md",
}
"""File of the root -> page."""

NOT_A_KIND = ("hydra",)


def on_files(files: Any, config: Any) -> Any:
    """mkdocs calls this when it has read docs/."""
    from mkdocs.structure.files import File

    for path, text in pages():
        files.append(File.generated(config, path, content=text))
    return files


def pages() -> Iterator[tuple[str, str]]:
    """Path of each page within docs/, and its Markdown."""
    for source, page in OF_ROOT.items():
        yield page, of_root((ROOT / source).read_text(encoding="utf-8"))
    for kind in kinds():
        yield f"components/{kind}.md", component(kind)
    yield "reference/keys.md", keys("train")
    yield "reference/evaluate_keys.md", keys("evaluate")
    yield "reference/tools.md", tools()


def of_root(text: str) -> str:
    """With its links as they are from docs/."""
    text = re.sub(r"\]\(docs/", "](", text)
    return re.sub(rf"\]\(({'|'.join(map(re.escape, OF_ROOT))})", lambda match: f"]({OF_ROOT[match[1]]}", text)


def kinds() -> list[str]:
    return sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name not in NOT_A_KIND)


def component(kind: str) -> str:
    """The page of a kind of part."""
    options = sorted((CONF / kind).glob("*.yaml"))
    rows = [f"| [`{kind}={file.stem}`](#{file.stem}) | {summary(file)} |" for file in options]
    parts = [f"# {kind}", "| option | |\n|-|-|\n" + "\n".join(rows)]
    if contract := contract_of(kind):
        parts += ["## Contract", f"::: dsv3.contracts.{contract}"]
    for file in options:
        text = file.read_text(encoding="utf-8")
        parts += [f"## {file.stem} {{ #{file.stem} }}", f"```yaml\n{text}```"]
        if target := (yaml.safe_load(text) or {}).get("_target_"):
            parts.append(f"::: {target}")
    return "\n\n".join(parts) + "\n"


def contract_of(kind: str) -> str | None:
    """The name in dsv3/contracts.py of what a kind's options are held to."""
    tree = ast.parse((ROOT / "dsv3" / "contracts.py").read_text(encoding="utf-8"))
    named = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    named |= {node.targets[0].id for node in tree.body if isinstance(node, ast.Assign)}  # type: ignore[attr-defined]
    candidates = (kind.title(), kind.upper(), kind.title().removesuffix("s"), f"{kind.title()}Factory")
    return next((name for name in candidates if name in named), None)


def tools() -> str:
    parts = ["# Tools", "`dsv3 <tool>` and `python -m dsv3 <tool>` are the same.", f"```\n{said('dsv3', '--help')}```"]
    for package in ("dsv3", "data"):
        for path in sorted((ROOT / package / "tools").glob("[!_]*.py")):
            name = path.stem.rstrip("_")
            parts += [f"## python -m {package} {name}", f"```\n{said(package, name, '--help')}```"]
    return "\n\n".join(parts) + "\n"


def said(package: str, *arguments: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        main(arguments, package=f"{package}.tools")
    return out.getvalue()


def keys(script: str) -> str:
    page = "\n".join(help_page(script, []))
    return f"# Keys of {script}.py\n\n`python {script}.py --help`:\n\n```\n{page}\n```\n"
