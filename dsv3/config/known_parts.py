"""Classes and functions that a run folder may name.

A run folder may come from anyone, and what its config.yaml names by `_target_` is called. So only what conf/ itself
names for that kind of part is built, and what the user allows: `allow=[package.Class]`.
"""

from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from dsv3.config.compose import EXPERIMENT
from dsv3.config.problems import shown
from dsv3.paths import CONF

TARGET = "_target_"


def refuse_unknown_parts(config: Any, *, source: Path, allow: Collection[str] = ()) -> None:
    """Return if `config`, read from the file `source`, names only known parts; nothing has been imported or called.

    A part within another is of the inner kind or of the outer one, such as `objective.reward`.

    Raises:
        ValueError: it names others; the message lists them.
    """
    known = _named_by_kind(CONF)
    unknown = {
        f"{key}={shown(target)}": target
        for key, target in targets(config)
        if target not in allow and not any(target in known.get(kind, ()) for kind in key.split("."))
    }
    if unknown:
        named = ", ".join(dict.fromkeys(map(shown, unknown.values())))
        raise ValueError(
            f"{source} names what no option in conf/ names for its kind:\n  "
            + "\n  ".join(unknown)
            + f"\nNothing was called. If you know this code and trust it, add allow=[{named}]."
        )


def targets(node: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every `_target_` at any depth, with its dotted key."""
    if isinstance(node, dict):
        for key, value in node.items():
            if key == TARGET:
                yield f"{prefix}{key}", value
            else:
                yield from targets(value, f"{prefix}{key}.")
    elif isinstance(node, list):
        for place, value in enumerate(node):
            yield from targets(value, f"{prefix}{place}.")


def targets_in(folder: Path) -> list[str]:
    """Every `_target_` that the configurations in a folder of the user's own name, whatever their kind."""
    return sorted({name for names in _named_by_kind(folder.resolve()).values() for name in names})


def allowed(config: DictConfig) -> list[str]:
    """What the key `allow` of a composed config names, and the configurations in this command's `--config-dir`."""
    own = [source.path for source in HydraConfig.get().runtime.config_sources] if HydraConfig.initialized() else []
    folders = [Path(path) for path in own if path and Path(path).is_dir() and Path(path) != CONF]
    return [*config.allow, *(target for folder in folders for target in targets_in(folder))]


@cache
def _named_by_kind(folder: Path) -> dict[str, set[str]]:
    """Kind of part -> the targets that files name for it: an option for its group, other files by their keys."""
    named: dict[str, set[str]] = {}
    for file in sorted(folder.rglob("*.yaml")):
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
        group = file.relative_to(folder).parts[0]
        by_key = group in (file.name, EXPERIMENT)
        for key, target in targets(content):
            named.setdefault(key.partition(".")[0] if by_key else group, set()).add(target)
    return named
