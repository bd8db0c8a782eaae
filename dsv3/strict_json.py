"""Standard JSON, which has no NaN and no infinity."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any


def finite(value: Any, *, instead: Callable[[float], Any] = lambda value: None) -> Any:
    """`value` in dicts, lists and Python numbers, with `instead(x)` for every x that is infinite or NaN.

    instead: `str` keeps their names ("inf", "nan"); by default they become null. Keys become text; tuples become lists;
    scalars of numpy and torch become Python's. What else is not JSON is returned as it is.
    """
    if isinstance(value, dict):
        return {str(key): finite(item, instead=instead) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item, instead=instead) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return instead(value) if isinstance(value, float) and not math.isfinite(value) else value


def text_of(value: Any, *, indent: int | None = 2) -> str:
    """`finite(value)` as JSON."""
    return json.dumps(finite(value), indent=indent, ensure_ascii=False, allow_nan=False, default=str)


def read_json(path: Path) -> Any:
    """What a file holds.

    Raises:
        OSError: it cannot be opened.
        ValueError: it is no JSON, or holds NaN or an infinity; the message names the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=_refuse)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read as JSON ({error}); restore it from a copy") from None


def _refuse(constant: str) -> float:
    """NaN and the infinities, which Python would read."""
    raise ValueError(f"it holds {constant}")
