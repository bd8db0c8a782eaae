"""Questions with one right answer, drawn from reasoning-gym's generators.

`families`: of each, the `generator` (its name in reasoning-gym), the number of questions drawn for `train`, and the
generator's `settings`. Held-out questions come from other seeds, and a question that was drawn for both is taken out of
training.
"""

import dataclasses
import enum
import importlib.metadata
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

VERSION = 1
"""Raised with every change of the code that draws other questions from the same families."""

HELD_OUT_SEEDS = 1_000_000_000
"""Offset of the seeds of held-out questions; training uses the seeds below it."""

Families = Mapping[str, Mapping[str, Any] | None]
"""null leaves a family out."""


class Drawn(NamedTuple):
    """A question with its answer."""

    family: str
    question: str
    answer: str
    held_out: bool
    entry: Mapping[str, Any]  # as the generator made it


def drawn_from(families: Families, *, held_out: int) -> Mapping[str, Any]:
    """Equal only where `draw` yields the same; JSON-serialisable."""
    generators = importlib.metadata.version("reasoning-gym")
    return {"version": VERSION, "generators": generators, "families": families, "held_out": held_out}


def draw(families: Families, *, held_out: int) -> Iterator[Drawn]:
    """Distinct questions, family after family: the held-out ones, then those of training that are not among them.

    Raises:
        ValueError: an unknown generator or setting; names the family.
    """
    for name, family in families.items():
        if family is not None:
            yield from _of_family(name, held_out=held_out, **family)


def _of_family(
    family: str, *, generator: str, settings: Mapping[str, Any], train: int, held_out: int
) -> Iterator[Drawn]:
    from reasoning_gym.factory import DATASETS

    if generator not in DATASETS:
        raise ValueError(f"families.{family}.generator={generator!r} is none of reasoning-gym's: {sorted(DATASETS)}")
    make, config = DATASETS[generator]
    seen: set[str] = set()
    for is_held_out, seed, size in ((True, HELD_OUT_SEEDS, held_out), (False, 0, train)):
        try:
            drawn = make(config(seed=seed, size=size, **typed(config, settings)))
        except (ValueError, AssertionError) as error:
            raise ValueError(f"families.{family}: {error}") from error
        for entry in drawn:
            question = entry["question"].strip()
            if question not in seen:
                seen.add(question)
                yield Drawn(family, question, str(entry["answer"]), is_held_out, entry)


def typed(config: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with strings turned into the enumeration members that the generator's configuration has."""
    defaults = {
        field.name: field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        for field in dataclasses.fields(config)
    }
    unknown = sorted(set(settings) - set(defaults))
    if unknown:
        raise ValueError(f"unknown settings {unknown}; there are {sorted(defaults)}")
    result = dict(settings)
    for name, value in settings.items():
        default = defaults[name]
        if isinstance(default, list) and default and isinstance(default[0], enum.Enum):
            result[name] = [type(default[0])(item) for item in value]
    return result
