"""A scripted Crafter policy: fixed priorities over what it has seen so far.

Survive (eat, drink, fight what is near, sleep), then climb the ladder of tools: wood, table, wooden tools, stone, stone
tools, furnace, coal and iron, iron tools, diamond. It walks by breadth-first search over cells that it has seen, and
digs through stone once it has a pickaxe.
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from crafter import constants, objects

Cell = tuple[int, int]
MOVES: dict[Cell, str] = {(-1, 0): "move left", (1, 0): "move right", (0, -1): "move up", (0, 1): "move down"}
WALKABLE = ("grass", "sand", "path")
SOURCES = {"wood": "tree"}
"""Materials by what they yield, where the names differ."""
TOOLS = ("wood_pickaxe", "wood_sword", "stone_pickaxe", "stone_sword", "iron_pickaxe", "iron_sword")
LOW, TIRED = 5, 3
NEAR = 6
"""Steps that it goes out of its way for an achievement."""


class ScriptedPolicy:
    """Called once before every step of the episode; gives the next action in words."""

    def __init__(self, env: Any) -> None:
        self.env = env
        self.seen = np.zeros(env._world.area, dtype=bool)

    def __call__(self) -> str:
        self.player, self.world = self.env._player, self.env._world
        self.has, self.done = self.player.inventory, self.player.achievements
        x, y = self.here = (int(self.player.pos[0]), int(self.player.pos[1]))
        self.seen[max(0, x - 4) : x + 5, max(0, y - 3) : y + 4] = True
        if self.player.sleeping:
            return "noop"
        return next((action for action in self._wishes() if action is not None), "noop")

    def _wishes(self) -> Iterator[str | None]:
        """Actions towards its goals, the most urgent first; None where a goal cannot be worked towards."""
        yield self._use((objects.Zombie, objects.Skeleton), at_most=0)
        if self.has["drink"] < LOW:
            yield self._use("water")
        if self.has["food"] < LOW:
            yield self._use(objects.Cow)
        if self.has["energy"] < TIRED:
            yield "sleep"
        yield None if self.done["collect_drink"] else self._use("water", at_most=NEAR)
        yield None if self.done["eat_cow"] else self._use(objects.Cow, at_most=NEAR)
        yield None if self.done["place_plant"] else self._plant()
        yield None if self.done["place_stone"] else self._place("stone")
        tool = next((tool for tool in TOOLS if not self.has[tool]), None)
        yield self._make(tool) if tool else self._use("diamond")
        yield self._walk(self._is_frontier)

    def _make(self, tool: str) -> str | None:
        """Gather what the tool and its workplaces need, go to or set up the workplaces, make it."""
        recipe = constants.make[tool]
        near, _ = self.world.nearby(self.player.pos, 1)
        missing = [place for place in recipe["nearby"] if place not in near]
        to_table = self._walk(lambda cell: self._is_beside(cell, "table"), at_most=15) if "table" in missing else None
        needs = dict(recipe["uses"])
        for place in missing:
            if place != "table" or to_table is None:
                for item, count in constants.place[place]["uses"].items():
                    needs[item] = needs.get(item, 0) + count
        for item, count in needs.items():
            if self.has[item] < count:
                return self._use(SOURCES.get(item, item))
        if to_table is not None:
            return to_table
        return self._place(missing[0]) if missing else f"make {tool.replace('_', ' ')}"

    def _plant(self) -> str | None:
        """Search the ground ahead for a sapling, and plant it."""
        if self.has["sapling"]:
            return self._place("plant")
        return "do" if self.world[self._ahead()] == ("grass", None) else None

    def _place(self, name: str) -> str | None:
        """Put a thing on the cell ahead, or turn to one where it may stand."""
        rule = constants.place[name]
        if any(self.has[item] < count for item, count in rule["uses"].items()):
            return None
        material, creature = self.world[self._ahead()]
        if creature is None and material in rule["where"]:
            return f"place {name}"
        return next((move for step, move in MOVES.items() if self._is_free(_add(self.here, step))), None)

    def _use(self, target: Any, *, at_most: int = 10_000) -> str | None:
        """Act upon the nearest target, a material or kinds of creatures, or go there."""
        for step, move in MOVES.items():
            if self._is(_add(self.here, step), target):
                return "do" if tuple(self.player.facing) == step else move
        return self._walk(lambda cell: self._is_beside(cell, target), at_most=at_most)

    def _walk(self, arrived: Callable[[Cell], bool], *, at_most: int = 10_000) -> str | None:
        """The first step of a shortest way to a cell elsewhere; None where there is none, or it is too long."""
        first: dict[Cell, Cell] = {self.here: (0, 0)}
        waiting = deque([(self.here, 0)])
        while waiting:
            cell, distance = waiting.popleft()
            if distance and arrived(cell):
                return self._towards(first[cell])
            if distance < at_most:
                for step in MOVES:
                    after = _add(cell, step)
                    if after not in first and self._is_passable(after):
                        first[after] = first[cell] if distance else step
                        waiting.append((after, distance + 1))
        return None

    def _towards(self, step: Cell) -> str:
        """Walk, or dig."""
        digs = not self._is_free(_add(self.here, step)) and tuple(self.player.facing) == step
        return "do" if digs else MOVES[step]

    def _ahead(self) -> Cell:
        return _add(self.here, self.player.facing)

    def _is(self, cell: Cell, target: Any) -> bool:
        material, creature = self.world[cell]
        if material is None or not self.seen[cell]:
            return False
        return (creature is None and material == target) if isinstance(target, str) else isinstance(creature, target)

    def _is_beside(self, cell: Cell, target: Any) -> bool:
        return any(self._is(_add(cell, step), target) for step in MOVES)

    def _is_free(self, cell: Cell) -> bool:
        material, creature = self.world[cell]
        return creature is None and material in WALKABLE

    def _is_passable(self, cell: Cell) -> bool:
        digs = bool(self.has["wood_pickaxe"]) and self._is(cell, "stone")
        return digs or (self._is_free(cell) and bool(self.seen[cell]))

    def _is_frontier(self, cell: Cell) -> bool:
        near = (_add(cell, step) for step in MOVES)
        return any(self.world[each][0] is not None and not self.seen[each] for each in near)


def _add(cell: Cell, step: Any) -> Cell:
    return cell[0] + int(step[0]), cell[1] + int(step[1])
