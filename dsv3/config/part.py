"""`part`: the only caller of Hydra's `instantiate`."""

from typing import Any

from hydra.utils import instantiate


def part(node: Any, **arguments: Any) -> Any:
    """What a config node with `_target_` describes: an object, or with `_partial_: true` a factory of it.

    Lists and mappings below the node arrive as plain Python ones.
    """
    return instantiate(node, _convert_="all", **arguments)
