"""BabyAI (arXiv 1810.08272) as text: five task types on minigrid's levels, and minigrid's bot as the expert.

The task types are those that BALROG plays. Their levels are rebuilt on minigrid's stock classes: a room of 6 x 6 cells
with the objects of the mission and no others, and for `open` a room with four doors.
"""

import contextlib
import io
import os
from typing import Any

import numpy as np

from dsv3.environments.episode import Expert
from dsv3.environments.wording import INVALID

os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # minigrid imports pygame, which greets on stdout

from minigrid.core.constants import IDX_TO_COLOR, IDX_TO_OBJECT
from minigrid.core.world_object import WorldObj
from minigrid.envs.babyai.core.roomgrid_level import RoomGridLevel
from minigrid.envs.babyai.core.verifier import BeforeInstr, GoToInstr, Instr, ObjDesc, PickupInstr, PutNextInstr
from minigrid.envs.babyai.open import OpenDoor
from minigrid.utils.baby_ai_bot import BabyAIBot

ACTIONS = {"turn left": 0, "turn right": 1, "go forward": 2, "pick up": 3, "drop": 4, "toggle": 5}
NOTHING = 6
"""minigrid's action `done`, which does nothing in these levels."""

DOOR_STATES = ("open", "closed", "locked")
HIDDEN = ("unseen", "empty", "floor", "wall")


class OneRoom(RoomGridLevel):
    """One room with the objects of the mission."""

    def __init__(self, task: str, *, steps: int) -> None:
        self.task = task
        super().__init__(num_rows=1, num_cols=1, room_size=8, max_steps=steps)

    def gen_mission(self) -> None:
        self.place_agent()
        first, *others = self.add_distractors(num_distractors=2 if self.task in TWO_OBJECTS else 1)
        self.check_objs_reachable()
        self.instrs = _instruction(self.task, first, *others)


TWO_OBJECTS = ("putnext", "pick_up_seq_go_to")


def _instruction(task: str, *objects: WorldObj) -> Instr:
    described = [ObjDesc(each.type, each.color) for each in objects]
    if task == "goto":
        return GoToInstr(*described)
    if task == "pickup":
        return PickupInstr(*described)
    if task == "putnext":
        return PutNextInstr(*described)
    return BeforeInstr(PickupInstr(described[0]), GoToInstr(described[1]))


class BabyAI:
    """An episode of a task type; progress is success."""

    actions = tuple(ACTIONS)

    def __init__(self, task: str, *, seed: int, steps: int) -> None:
        self.env: Any = OpenDoor(max_steps=steps) if task == "open" else OneRoom(task, steps=steps)
        with contextlib.redirect_stdout(io.StringIO()):  # it prints the layouts that it rejects
            seen, _ = self.env.reset(seed=seed)
        self._seen = seen
        self._taken: int | None = None
        self._ended = self._success = False
        self.rules = f"Mission: {self.env.mission}.\nActions: {', '.join(self.actions)}."

    @property
    def achieved(self) -> list[str]:
        return ["mission"] if self._success else []

    @property
    def progress(self) -> float:
        return float(self._success)

    @property
    def over(self) -> bool:
        return self._ended

    def step(self, action: str | None) -> None:
        self._taken = ACTIONS[action] if action is not None else NOTHING
        self._seen, reward, terminated, truncated, _ = self.env.step(self._taken)
        self._success = terminated and reward > 0
        self._ended = terminated or truncated

    def observation(self) -> str:
        carried = self.env.carrying
        lines = [INVALID] if self._taken == NOTHING else []
        lines.append(f"You see: {', '.join(self._visible()) or 'nothing'}.")
        if carried is not None:
            lines.append(f"You carry: {_a(f'{carried.color} {carried.type}')}.")
        return "\n".join(lines)

    def _visible(self) -> list[str]:
        """Objects in view, nearest first, then the walls ahead and to the sides."""
        image = self._seen["image"]
        columns, rows, _ = image.shape
        middle, bottom = columns // 2, rows - 1
        found = []
        for x in range(columns):
            for y in range(rows):
                kind = IDX_TO_OBJECT[int(image[x, y, 0])]
                if kind not in HIDDEN and (x, y) != (middle, bottom):
                    colour = IDX_TO_COLOR[int(image[x, y, 1])]
                    state = f"{DOOR_STATES[int(image[x, y, 2])]} " if kind == "door" else ""
                    ahead, right = bottom - y, x - middle
                    found.append((ahead + abs(right), ahead, right, f"{state}{colour} {kind}"))
        walls = []
        for name, (dx, dy) in {"ahead": (0, -1), "left": (-1, 0), "right": (1, 0)}.items():
            x, y, distance = middle + dx, bottom + dy, 1
            while 0 <= x < columns and y >= 0 and IDX_TO_OBJECT[int(image[x, y, 0])] != "wall":
                x, y, distance = x + dx, y + dy, distance + 1
            if 0 <= x < columns and y >= 0:
                walls.append(f"a wall {distance} {name}")
        return [f"{_a(words)} {_place(ahead, right)}" for _, ahead, right, words in sorted(found)] + walls

    def state(self) -> bytes:
        carried = self.env.carrying
        held = b"" if carried is None else bytes(carried.encode())
        place = bytes([*map(int, self.env.agent_pos), int(self.env.agent_dir)])
        return self.env.grid.encode().tobytes() + place + held

    def frame(self) -> np.ndarray:
        return self.env.get_frame(highlight=True, tile_size=24)

    def expert(self) -> Expert:
        """minigrid's bot."""
        bot = BabyAIBot(self.env)
        names = {number: name for name, number in ACTIONS.items()}
        return lambda: names[int(bot.replan(self._taken))]


def _a(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _place(ahead: int, right: int) -> str:
    """Steps ahead and to a side."""
    side = f"{abs(right)} {'right' if right > 0 else 'left'}" if right else ""
    return " and ".join(filter(None, (f"{ahead} ahead" if ahead else "", side)))
