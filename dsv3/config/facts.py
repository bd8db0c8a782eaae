"""Lookups in a composed config, for relations between its values."""

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

from dsv3.config.problems import Problem
from dsv3.config.view import View

MODEL_EXPERTS = "model.n_routed_experts"


class Number(NamedTuple):
    key: str  # the key that holds it
    value: float


class Facts:
    """Looks up what relations need. Keys in `skip` count as absent: something was already reported about them."""

    def __init__(self, view: View, skip: Collection[str]) -> None:
        self.view = view
        self.skip = skip

    def value(self, key: str) -> Any:
        if self.view.origin(key) in self.skip or key in self.skip:
            return None
        return self.view.leaves.get(key)

    def number(self, *keys: str) -> Number | None:
        """The first of `keys` that exists and is a number."""
        for key in keys:
            value = self.value(key)
            if isinstance(value, int | float) and not isinstance(value, bool):
                return Number(self.view.origin(key), value)
        return None


Relation = Callable[[Facts], Iterator[Problem]]
