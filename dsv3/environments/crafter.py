"""Crafter (arXiv 2109.06780) as text; progress is the share of its 22 achievements."""

import copy
import functools
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import crafter
import numpy as np
from crafter import constants, engine

from dsv3.environments.crafter_policy import ScriptedPolicy
from dsv3.environments.episode import Expert
from dsv3.environments.wording import INVALID

ACTIONS = {name.replace("_", " "): number for number, name in enumerate(constants.actions)}
NOTHING = ACTIONS["noop"]
SIDEWAYS, UPWARDS = 4, 3
"""Cells that the agent sees to each side of itself, and above and below."""
STATUS = ("health", "food", "drink", "energy")
PIXELS = 240


class OrderedSet(dict[Any, None]):
    """A set that is iterated over in the order of insertion."""

    def add(self, item: Any) -> None:
        self[item] = None

    def remove(self, item: Any) -> None:
        del self[item]


class OrderedWorld(engine.World):
    """Crafter's world with its creatures in an order of their own.

    Crafter keeps them in sets, whose order follows from addresses in memory, and draws from that order which creature
    vanishes: one seed gave several episodes.
    """

    def reset(self, seed: int | None = None) -> None:
        super().reset(seed)
        self._chunks: defaultdict[Any, OrderedSet] = defaultdict(OrderedSet)


@functools.lru_cache(maxsize=32)
def _begun(seed: int) -> Any:
    """Crafter before its first step. Generating a world takes a second; the model and both baselines begin with one."""
    env = crafter.Env(seed=seed)
    env._world.__class__ = OrderedWorld  # its views hold this very world
    env.reset()
    return env


class Crafter:
    """An episode. `noop` is a legal action; an invalid one does the same and is told to the agent."""

    actions = tuple(ACTIONS)
    rules = (
        "You survive in a world of blocks: gather, eat, drink, build, fight. New achievements count.\n"
        f"Actions: {', '.join(actions)}."
    )

    def __init__(self, *, seed: int, steps: int) -> None:
        self.env: Any = copy.deepcopy(_begun(seed))
        self.env._length = steps
        self.achieved: list[str] = []
        self._invalid = self._ended = False

    @property
    def progress(self) -> float:
        return len(self.achieved) / len(constants.achievements)

    @property
    def over(self) -> bool:
        return self._ended

    @property
    def player(self) -> Any:
        return self.env._player

    def step(self, action: str | None) -> None:
        self._invalid = action is None
        *_, self._ended, info = self.env.step(ACTIONS[action] if action is not None else NOTHING)
        new = [name for name, count in info["achievements"].items() if count and name not in self.achieved]
        self.achieved += new

    def observation(self) -> str:
        inventory = self.player.inventory
        facing = _kind(self.env._world, self.player.pos + self.player.facing)
        owned = [f"{count} {name.replace('_', ' ')}" for name, count in inventory.items() if count]
        lines = [INVALID] if self._invalid else []
        lines += ["You are asleep."] if self.player.sleeping else []
        lines.append(f"You see: {', '.join(self._visible())}.")
        lines.append(f"You face: {facing}.")
        lines.append(f"Status: {', '.join(f'{name} {inventory[name]}' for name in STATUS)}.")
        if held := [words for words in owned if words.partition(" ")[2] not in STATUS]:
            lines.append(f"You have: {', '.join(held)}.")
        return "\n".join(lines)

    def _visible(self) -> Iterator[str]:
        """The nearest of each kind in view, nearest first."""
        nearest: dict[str, tuple[int, int, int]] = {}
        for dx in range(-SIDEWAYS, SIDEWAYS + 1):
            for dy in range(-UPWARDS, UPWARDS + 1):
                kind = _kind(self.env._world, self.player.pos + np.array((dx, dy)))
                if (dx, dy) != (0, 0) and kind != "nothing":
                    nearest[kind] = min(nearest.get(kind, (99, 0, 0)), (abs(dx) + abs(dy), dx, dy))
        for kind, (_, dx, dy) in sorted(nearest.items(), key=lambda item: (item[1], item[0])):
            yield f"{kind} {_place(dx, dy)}"

    def state(self) -> bytes:
        inventory = ",".join(f"{name}{count}" for name, count in self.player.inventory.items())
        return self.env._sem_view().tobytes() + f"{tuple(map(int, self.player.pos))}{inventory}".encode()

    def frame(self) -> np.ndarray:
        return self.env.render((PIXELS, PIXELS))

    def expert(self) -> Expert:
        return ScriptedPolicy(self.env)


def _kind(world: Any, place: np.ndarray) -> str:
    material, creature = world[tuple(place)]
    return type(creature).__name__.lower() if creature is not None else material or "nothing"


def _place(dx: int, dy: int) -> str:
    parts = [
        f"{abs(dy)} {'down' if dy > 0 else 'up'}" if dy else "",
        f"{abs(dx)} {'right' if dx > 0 else 'left'}" if dx else "",
    ]
    return " and ".join(filter(None, parts))
