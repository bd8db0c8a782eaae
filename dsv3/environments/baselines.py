"""Baselines of an episode: random legal actions, and the expert's."""

import functools
import random
from typing import NamedTuple

from dsv3.environments.episode import Episode, Expert, opened


class Baselines(NamedTuple):
    """Progress, from 0 to 1."""

    random: float
    expert: float


@functools.lru_cache(maxsize=10_000)
def baselines(name: str, *, seed: int, steps: int) -> Baselines:
    """Of one episode; the same for every model that plays it."""
    by_chance, by_expert = (opened(name, seed=seed, steps=steps) for _ in range(2))
    play_out(by_chance, random_actions(by_chance, seed))
    play_out(by_expert, by_expert.expert())
    return Baselines(by_chance.progress, by_expert.progress)


def random_actions(episode: Episode, seed: int) -> Expert:
    """Legal actions, each as likely as the others."""
    draws = random.Random(seed)
    return lambda: draws.choice(episode.actions)


def play_out(episode: Episode, policy: Expert) -> list[str]:
    """Let a policy play to the end; its actions."""
    taken = []
    while not episode.over:
        taken.append(policy())
        episode.step(taken[-1])
    return taken
