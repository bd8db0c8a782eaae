"""Every way that chance can take, each with its probability: exact distributions of what draws at random."""

from collections import defaultdict
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from dsv3.inference.sampling import Chance


class Scripted(Chance):
    """Decides as its script says, and then always the first way; `open` are the ways not taken, `weight` this one's."""

    def __init__(self, script: list[int]) -> None:
        super().__init__(None)
        self.script, self.taken, self.weight = script, list[int](), 1.0
        self.open: list[list[int]] = []

    def decide(self, probabilities: list[float]) -> int:
        possible = [way for way, probability in enumerate(probabilities) if probability > 0]
        step = len(self.taken)
        if step < len(self.script):
            way = self.script[step]
        else:
            way, *others = possible
            self.open += [[*self.taken, other] for other in others]
        self.taken.append(way)
        self.weight *= probabilities[way]
        return way

    def happens(self, probability: float) -> bool:
        probability = min(probability, 1.0)
        return self.decide([probability, 1 - probability]) == 0

    def draw(self, weights_V: Tensor) -> int:
        weights_V = weights_V.double()
        return self.decide((weights_V / weights_V.sum()).tolist())


def every_outcome(experiment: Callable[[Any], Hashable]) -> dict[Hashable, float]:
    """The probability of each result of `experiment(chance)`."""
    result: dict[Hashable, float] = defaultdict(float)
    waiting: list[list[int]] = [[]]
    while waiting:
        chance = Scripted(waiting.pop())
        result[experiment(chance)] += chance.weight
        waiting += chance.open
    return dict(result)
