"""Right answers to families of reasoning-gym whose entries have none: from their facts, made, or looked for."""

import itertools
import json
from collections.abc import Callable, Iterator
from typing import Any

SETTINGS = {"rush_hour": {"max_moves": 2}}
"""Of generators: puzzles that trying all moves solves."""


def boxnet(entry: dict[str, Any], score: Callable[[str], float]) -> str:
    """Each box is moved square by square, first along the rows, then to its target."""
    squares = entry["metadata"]["initial_state"]
    place = {item: [float(n) for n in at.split("_")] for at, items in squares.items() for item in items}
    plan: list[dict[str, str]] = []
    for box in (item for item in place if item.startswith("box_")):
        at, target = place[box], box.replace("box_", "target_")
        for axis in (0, 1):
            while at[axis] != place[target][axis]:
                to = at.copy()
                to[axis] += 1.0 if place[target][axis] > at[axis] else -1.0
                plan.append({f"Agent{at}": f"move({box}, square{to})"})
                at = to
        plan.append({f"Agent{at}": f"move({box}, {target})"})
    return json.dumps(plan)


def rush_hour(entry: dict[str, Any], score: Callable[[str], float]) -> str:
    cars = sorted(set(entry["metadata"]["board_config"]) - set("ox"))
    moves = [f"{car}{steps:+d}" for car in cars for steps in (1, 2, 3, 4, -1, -2, -3, -4)]
    tried: Iterator[str] = (" ".join(some) for count in (1, 2) for some in itertools.product(moves, repeat=count))
    return next(answer for answer in tried if score(answer) == 1.0)


RIGHT: dict[str, Callable[[dict[str, Any], Callable[[str], float]], str]] = {
    "boxnet": boxnet,
    "graph_color": lambda entry, score: json.dumps(entry["metadata"]["possible_answer"]),
    "propositional_logic": lambda entry, score: entry["metadata"]["example_answer"],
    "rubiks_cube": lambda entry, score: entry["metadata"]["example_correct_answer"],
    "rush_hour": rush_hour,
}
"""The family -> its right answer, from the entry and the library's own score."""
