"""Episodes: the contract of an environment that is played in words, and opening one by name and seed."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any, Protocol

import numpy as np

EVALUATION_SEEDS = 2_000_000_000
"""Seeds from here on are for evaluation alone; demonstrations and training prompts take those below."""

ENVIRONMENTS = {
    "babyai/goto": "dsv3.environments.babyai:BabyAI",
    "babyai/pickup": "dsv3.environments.babyai:BabyAI",
    "babyai/open": "dsv3.environments.babyai:BabyAI",
    "babyai/putnext": "dsv3.environments.babyai:BabyAI",
    "babyai/pick_up_seq_go_to": "dsv3.environments.babyai:BabyAI",
    "crafter": "dsv3.environments.crafter:Crafter",
}

Expert = Callable[[], str]
"""The action to take now; asked once before every step."""


class Episode(Protocol):
    """One episode: everything in it follows from its name, seed and actions."""

    actions: Sequence[str]
    """The legal ones, in words."""
    rules: str
    """What the agent is to do, and with which actions; the same throughout the episode."""
    achieved: Sequence[str]
    """What counts towards the progress, in the order it was reached."""

    @property
    def progress(self) -> float:
        """From 0 to 1."""

    @property
    def over(self) -> bool:
        """Whether no further action is taken: success, death or the last step."""

    def observation(self) -> str:
        """What the agent sees now, in words."""

    def step(self, action: str | None) -> None:
        """Take a legal action. None, an invalid one: time passes and nothing is done."""

    def state(self) -> bytes:
        """Equal only for equal states, as far as a trajectory's hash has to tell them apart."""

    def frame(self) -> np.ndarray:
        """A picture of the present state, uint8 [height, width, 3]."""

    def expert(self) -> Expert:
        """A policy that knows how to play, from the first step on."""


def check_name(name: str) -> str:
    """The name.

    Raises:
        ValueError: there is no environment of this name.
    """
    if name not in ENVIRONMENTS:
        near = difflib.get_close_matches(name, ENVIRONMENTS, n=1, cutoff=0.0)
        raise ValueError(f"environment={name}: must be one of {', '.join(ENVIRONMENTS)}. Did you mean {near[0]!r}?")
    return name


def in_turns(row: Mapping[str, Any]) -> bool:
    """Whether a row of prompts opens an episode that is played turn by turn, not in a plan."""
    return "environment" in row and row.get("form") == "turns"


def opened(name: str, *, seed: int, steps: int) -> Episode:
    """A new episode of at most `steps` steps.

    Raises:
        ValueError: there is no environment of this name.
        ModuleNotFoundError: the extra `agents` is not installed.
    """
    module, _, factory = ENVIRONMENTS[check_name(name)].partition(":")
    task = name.partition("/")[2]
    make: Callable[..., Episode] = getattr(import_module(module), factory)
    return make(task, seed=seed, steps=steps) if task else make(seed=seed, steps=steps)
