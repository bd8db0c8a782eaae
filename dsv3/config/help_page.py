"""The page that `python train.py --help` prints, made from the files of conf/ and their comments."""

import re
from collections.abc import Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from dsv3.config.compose import COMPOSITION_ERRORS, Composer, choices, hydra_flags, opened
from dsv3.config.problems import shown

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
INNER = ("_partial_", "_convert_", "_recursive_", "_args_")
"""How Hydra builds a part: nothing to choose."""


def help_page(config_name: str, arguments: Sequence[str]) -> list[str]:
    """Lines: usage, the groups with their options, the keys of those chosen, then what the others add."""
    flags = hydra_flags(arguments)
    with opened(config_name, flags) as composer:
        try:
            config = composer.compose(flags.overrides)
        except COMPOSITION_ERRORS:
            config = composer.compose([])
        return list(_page(composer, config))


def _page(composer: Composer, config: DictConfig) -> Iterator[str]:
    chosen = choices(config)
    groups = [group for group in composer.groups() if group in chosen]
    content: Any = OmegaConf.to_container(config, resolve=False)
    tree = {name: content[name] for name in sorted(content, key=lambda name: name in chosen) if name != "hydra"}
    missing = [f"{key}=..." for key, value in _flat(tree, "").items() if value == "???"]
    script = " ".join([f"python {composer.config_name}.py", *missing])
    primary = _file(composer, composer.config_name)
    yield summary(primary) if primary else ""
    yield from ("", "USAGE", f"  {script} [group=option ...] [key=value ...] [Hydra's flags]", "")
    if groups:
        yield from ("GROUPS", "  * marks the selected option; group=option selects another.", "")
        for group in groups:
            yield from _group(composer, group, chosen[group])
        yield ""
    yield from ("KEYS", "  ${...} refers to another key.", "")
    yield from _keys(tree, "", _comments_of(composer, chosen))
    if groups:
        yield from ("", "KEYS OF UNSELECTED OPTIONS", "")
        for group in groups:
            yield from _other_keys(composer, group, chosen[group], tree)
    yield from _closing(script, next(_swaps(composer, groups, chosen), ""), multirun="seed" in tree)


def _swaps(composer: Composer, groups: Sequence[str], chosen: dict[str, Any]) -> Iterator[str]:
    return (f"{group}={option}" for group in groups for option in composer.options(group) if option != chosen[group])


def _group(composer: Composer, group: str, option: object) -> Iterator[str]:
    options = composer.options(group)
    ordered = sorted(options, key=lambda name: name != option)
    width = max(len(name) for name in options)
    yield f"  {group}" + (" (none chosen)" if option is None else "")
    for name in ordered:
        file = _file(composer, f"{group}/{name}")
        mark = "*" if name == option else " "
        yield f"    {mark} {name:<{width}}  {summary(file) if file else ''}".rstrip()


def _keys(tree: dict[str, Any], prefix: str, comments: dict[str, str]) -> Iterator[str]:
    for name, value in tree.items():
        key = f"{prefix}{name}"
        comment = f"  # {comments[key]}" if key in comments else ""
        if name in INNER:
            continue
        if isinstance(value, dict) and value:
            if comment:
                yield f"  {key}:{comment}"
            yield from _keys(value, f"{key}.", comments)
        else:
            yield f"  {key}={shown(value)}{comment}"


def _other_keys(composer: Composer, group: str, chosen: str | None, tree: dict[str, Any]) -> Iterator[str]:
    """Keys that a group's options bring where they are not chosen."""
    seen = set(_flat(tree.get(group, {}), ""))
    for option in composer.options(group):
        file = _file(composer, f"{group}/{option}")
        if option == chosen or file is None or (package := _package(file, group)) == "_global_":
            continue
        comments, values = read(file, package.partition(f"{group}.")[2])
        new = {k: value for k, value in values.items() if k not in seen and k.rpartition(".")[2] not in INNER}
        seen |= set(new)
        for key, value in new.items():
            comment = f"  # {comments[key]}" if key in comments else ""
            yield f"  {group}.{key}={shown(value)}{comment}  ({group}={option})"


def _flat(tree: object, prefix: str) -> dict[str, object]:
    if not isinstance(tree, dict) or not tree:
        return {prefix.rstrip("."): tree}
    return {key: value for name, child in tree.items() for key, value in _flat(child, f"{prefix}{name}.").items()}


def _closing(script: str, swap: str, *, multirun: bool) -> Iterator[str]:
    yield from ("", "EXAMPLES", f"  {script}")
    if swap:
        yield f"  {script} {swap}"
        yield f"  {script} {swap} --help    the same page, for that choice"
    if multirun:
        yield f"  {script} --multirun seed=1,2,3"
    yield f"  {script} --cfg job --resolve    print the composed config and stop"
    yield from ("", "HYDRA")
    yield "  +key=value adds a key, ~key deletes one, --multirun (-m) runs every combination of comma-separated values,"
    yield "  --config-dir (-cd) adds a folder of your own options. --hydra-help lists all flags."


def _file(composer: Composer, name: str) -> Path | None:
    files = (folder / f"{name}.yaml" for folder in composer.folders)
    return next((file for file in files if file.is_file()), None)


def summary(file: Path) -> str:
    """The first sentence of the comment that a YAML file opens with, Hydra's `# @package` apart."""
    lines = file.read_text(encoding="utf-8").splitlines()
    comment = [line for line in takewhile(lambda line: line.startswith("#"), lines) if "@package" not in line]
    text = " ".join(line.lstrip("# ").rstrip() for line in comment)
    return re.split(r"(?<=\.)\s+(?=[A-Z])", text)[0]


def _comments_of(composer: Composer, chosen: dict[str, Any]) -> dict[str, str]:
    """Dotted key -> comment; an option without its own takes that of another option in its group."""
    primary = _file(composer, composer.config_name)
    comments = read(primary)[0] if primary else {}
    for group, option in chosen.items():
        names = [*(name for name in composer.options(group) if name != option), option]
        for name in names:
            if file := _file(composer, f"{group}/{name}"):
                package = _package(file, group.replace("/", "."))
                comments |= {f"{package}.{key}": comment for key, comment in read(file)[0].items()}
    return comments


def _package(file: Path, group: str) -> str:
    """Where Hydra puts what an option holds: where its header says, or under its group."""
    header = re.match(r"# @package (\S+)", file.read_text(encoding="utf-8"))
    return header[1] if header else group


def read(file: Path, below: str = "") -> tuple[dict[str, str], dict[str, object]]:
    """A YAML file's trailing comments and its values, both by dotted key; `defaults` is left out.

    below: key that all others are under.
    """
    text = file.read_text(encoding="utf-8")
    root = yaml.compose(text, Loader=_LOADER)
    comments: dict[str, str] = {}
    if isinstance(root, yaml.MappingNode):
        _collect(root, f"{below}." if below else "", text.splitlines(), comments)
    values = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    assert isinstance(values, dict)
    values.pop("defaults", None)
    return comments, _flat(values, f"{below}." if below else "") if values else {}


def _collect(node: yaml.MappingNode, prefix: str, lines: list[str], comments: dict[str, str]) -> None:
    for name, value in node.value:
        key = f"{prefix}{name.value}"
        block = isinstance(value, yaml.CollectionNode) and not value.flow_style
        end = name.end_mark if block or value.end_mark.line != name.end_mark.line else value.end_mark
        _, mark, comment = lines[end.line][end.column :].partition("#")
        if mark:
            comments[key] = comment.strip()
        if isinstance(value, yaml.MappingNode):
            _collect(value, f"{key}.", lines, comments)
