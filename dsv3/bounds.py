"""Ranges as annotations: `dim: PositiveInt`, `rate: Annotated[float, Between(0, 1)]`.

A range stands once, where the value is declared: in the signature of a plugin or the options of a tool. The preflight
reads it from the source, without importing the plugin.
"""

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, get_args, get_origin


@dataclass(frozen=True)
class Between:
    """low <= value <= high."""

    low: float
    high: float

    def problem(self, value: float) -> str | None:
        """What must hold, in words; None where it does."""
        return None if self.low <= value <= self.high else f"must be between {self.low:,} and {self.high:,}"


@dataclass(frozen=True)
class AtLeast:
    low: float

    def problem(self, value: float) -> str | None:
        return _unless_infinite(value) or (None if value >= self.low else f"must be {self.low} or more")


@dataclass(frozen=True)
class Above:
    low: float

    def problem(self, value: float) -> str | None:
        return _unless_infinite(value) or (None if value > self.low else f"must be above {self.low}")


def _unless_infinite(value: float) -> str | None:
    return None if math.isfinite(value) else "must be a finite number"


@dataclass(frozen=True)
class ArgumentsOf:
    """Of a mapping: its keys are arguments of this class, with their types and ranges."""

    kind: type


def problem_of(annotation: Any, value: Any) -> str | None:
    """What must hold of `value` by the ranges in an annotation (as an object, not as source), where it does not."""
    if get_origin(annotation) is Annotated and isinstance(value, int | float):
        found = [note.problem(value) for note in annotation.__metadata__ if isinstance(note, Between | AtLeast | Above)]
        return next(filter(None, found), None)
    inner = get_args(annotation) if value is not None else ()
    return next(filter(None, (problem_of(each, value) for each in inner)), None)


PositiveInt = Annotated[int, Above(0)]
NonNegativeInt = Annotated[int, AtLeast(0)]
PositiveFloat = Annotated[float, Above(0)]
NonNegativeFloat = Annotated[float, AtLeast(0)]
FiniteFloat = Annotated[float, AtLeast(-math.inf)]
Fraction = Annotated[float, Between(0, 1)]
Seed = Annotated[int, Between(0, 4_294_967_295)]  # what NumPy and Grain take


def seconds_of(time_limit: str) -> int:
    """Of DD:HH:MM:SS.

    Raises:
        ValueError: it is not of that form, or no time at all.
    """
    found = re.fullmatch(r"(\d+):(\d\d):(\d\d):(\d\d)", time_limit, re.ASCII)
    days, hours, minutes, seconds = map(int, found.groups()) if found else (0, 0, 0, 0)
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise ValueError("must be DD:HH:MM:SS above zero, such as 00:03:50:00, or null for no limit")
    return total
