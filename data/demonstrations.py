"""Demonstrations: episodes that the expert of an environment plays, as conversations and prompts.

    steps     a conversation for each step: what is seen, and the expert's action
    plans     a conversation for each episode: what is seen at first, and all of the expert's actions
    prompts   the questions of `plans` for reinforcement learning with the reward `episode`, which plays the answer
    turns     the first question of `steps`, for reinforcement learning on whole episodes, played turn by turn

Seeds lie below those of evaluation. Every twentieth episode is held out, whole.
"""

import importlib.metadata
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from data.example_sources import ExampleRow, ExampleSource
from data.generated import conversation_row
from dsv3.bounds import NonNegativeInt, PositiveFloat, PositiveInt
from dsv3.environments import ENVIRONMENTS, EVALUATION_SEEDS, ask, check_name, opened, plan_of

VERSION = 1
"""Raised with every change of the code that makes other rows of the same settings."""

Form = Literal["steps", "plans", "prompts", "turns"]

HELD_OUT_EVERY = 20
PACKAGES = ("minigrid", "crafter")


def demonstrations(
    *,
    environment: str,
    episodes: PositiveInt,
    first_seed: NonNegativeInt,
    steps: PositiveInt,
    history: NonNegativeInt,
    form: Form,
    weight: PositiveFloat,
) -> ExampleSource:
    """`environment`: a name, or what several names begin with, which then take turns. `episodes`: of all of them
    together. `steps`: of an episode, at most. `history`: earlier steps in each prompt; of `turns`, earlier turns that
    stay in the conversation.

    Raises:
        ValueError: there is no such environment, or seeds reach into those of evaluation.
    """
    names = named(environment)
    if first_seed + episodes > EVALUATION_SEEDS:
        raise ValueError(f"first_seed={first_seed}: first_seed + episodes must be at most {EVALUATION_SEEDS:,}")
    settings = {"environments": names, "episodes": episodes, "first_seed": first_seed, "steps": steps}
    settings |= {"history": history, "form": form, "version": VERSION}

    def identity() -> Mapping[str, Any]:
        return settings | {"packages": [importlib.metadata.version(package) for package in PACKAGES]}

    def rows() -> Iterator[ExampleRow]:
        for number in range(episodes):
            name, seed = names[number % len(names)], first_seed + number
            common = {"family": name, "environment": name, "seed": seed, "held_out": number % HELD_OUT_EVERY == 0}
            for row in episode_rows(name, seed=seed, steps=steps, history=history, form=form):
                yield ExampleRow(f"{name}, seed {seed}", row | common)

    return ExampleSource(weight=weight, identity=identity, rows=rows)


def named(environment: str) -> list[str]:
    """The environments of this name, or below it."""
    below = [name for name in ENVIRONMENTS if name.startswith(f"{environment}/")]
    return below or [check_name(environment)]


def episode_rows(name: str, *, seed: int, steps: int, history: int, form: Form) -> Iterator[dict[str, Any]]:
    """The rows of one episode, in which the expert plays; none of plans that fail. Turns are left to the policy."""
    episode = opened(name, seed=seed, steps=steps)
    if form == "turns":
        how = {"form": form, "steps": steps, "history": history, "verifier": "episode"}
        yield {"prompt": ask(episode.rules, [], episode.observation()), **how}
        return
    expert, earlier = episode.expert(), list[tuple[str, str]]()
    while not episode.over:
        seen, action = episode.observation(), expert()
        if form == "steps":
            yield conversation_row(
                ask(episode.rules, earlier[len(earlier) - min(history, len(earlier)) :], seen), action
            )
        earlier.append((seen, action))
        episode.step(action)
    if form != "steps" and episode.progress > 0:
        yield from _whole(ask(episode.rules, [], earlier[0][0], plan=True), [done for _, done in earlier], steps, form)


def _whole(question: str, actions: Sequence[str], steps: int, form: Form) -> Iterator[dict[str, Any]]:
    if form == "plans":
        yield conversation_row(question, plan_of(actions))
    else:
        yield {"prompt": question, "steps": steps, "verifier": "episode"}
