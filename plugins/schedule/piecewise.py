"""A value as a piecewise function of the tokens trained on: warm-up, plateaus, decays and jumps.

With x = tokens / total_tokens, the value is peak * factor(x). The factor begins at `start`; each segment leads
from where the one before ended to its own `to`, which it reaches at x = `until`:
    linear: from + (to - from) * p          cosine: to + (from - to) * (1 + cos(pi p)) / 2
where p runs from 0 to 1 over the segment. A segment without width is a jump: at exactly x = `until` the new
value holds. At x = 1 and beyond, the last value holds.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from dsv3.bounds import ArgumentsOf, NonNegativeFloat, PositiveInt

KEYS = {"until", "to", "shape"}


class Segment(NamedTuple):
    until: float  # fraction of the run at which it ends
    to: float  # factor on the peak that it reaches there
    shape: Literal["linear", "cosine"]


class Piecewise:
    """A pure function of the number of tokens (`dsv3.contracts.Schedule`), in the unit of `peak`.

    total_tokens: length of the run that the fractions are of.
    peak: what every factor multiplies.
    start: the factor at token 0.
    segments: mappings with the keys `until`, `to` and `shape`, in order; the last one ends at 1.

    Raises ValueError, naming the segment and its values, where these do not describe a function.
    """

    def __init__(
        self,
        *,
        total_tokens: PositiveInt,
        peak: NonNegativeFloat,
        start: NonNegativeFloat,
        segments: Sequence[Annotated[Mapping[str, Any], ArgumentsOf(Segment)]],
    ) -> None:
        if total_tokens <= 0:
            raise ValueError(f"total_tokens={total_tokens}: must be at least 1")
        for key, value in (("peak", peak), ("start", start)):
            if not math.isfinite(value):
                raise ValueError(f"{key}={value}: must be a finite number")
        self.total_tokens = total_tokens
        self.peak = peak
        self.start = start
        self.segments = _checked(segments)

    def __call__(self, tokens: int) -> float:
        x = tokens / self.total_tokens
        begin, factor = 0.0, self.start
        for segment in self.segments:
            if x < segment.until:
                return self.peak * _between(factor, segment, (x - begin) / (segment.until - begin))
            begin, factor = segment.until, segment.to
        return self.peak * factor


def _between(start: float, segment: Segment, p: float) -> float:
    if segment.shape == "linear":
        return start + (segment.to - start) * p
    return segment.to + (start - segment.to) * (1 + math.cos(math.pi * p)) / 2


def _checked(segments: Sequence[Annotated[Mapping[str, Any], ArgumentsOf(Segment)]]) -> list[Segment]:
    result: list[Segment] = []
    end = 0.0
    for index, given in enumerate(segments):
        where = f"segments[{index}]={dict(given)}"
        if set(given) != KEYS:
            raise ValueError(f"{where}: must have the keys {sorted(KEYS)}")
        segment = Segment(float(given["until"]), float(given["to"]), given["shape"])
        if segment.shape not in ("linear", "cosine"):
            raise ValueError(f"{where}: shape must be linear or cosine")
        if not end <= segment.until <= 1:
            raise ValueError(f"{where}: until must be between {end}, where the previous segment ends, and 1")
        if not math.isfinite(segment.to):
            raise ValueError(f"{where}: to must be a finite number")
        result.append(segment)
        end = segment.until
    if end != 1:
        raise ValueError(f"segments end at {end}: the last one must have until=1.0")
    return result
