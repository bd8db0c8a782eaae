"""Crafter as text: one seed is one episode, in any process; the scripted policy climbs the ladder."""

import math
import os
import random
import subprocess
import sys
from statistics import mean, variance
from typing import Any

import crafter
import pytest

from dsv3.environments import EVALUATION_SEEDS, opened
from dsv3.environments.baselines import baselines, play_out, random_actions
from dsv3.environments.crafter import ACTIONS
from tests.conftest import ROOT

SEED = 5

HASH = """
import hashlib
from dsv3.environments import opened
from dsv3.environments.baselines import random_actions

def trajectory_hash(name, seed, steps):
    episode, found = opened(name, seed=seed, steps=steps), hashlib.sha256()
    policy = random_actions(episode, seed)
    while not episode.over:
        episode.step(policy())
        found.update(episode.state() + episode.observation().encode())
    return found.hexdigest()
"""
"""Of random actions, everything that is seen."""


def trajectory_hash(name: str, seed: int, steps: int) -> str:
    scope: dict[str, Any] = {}
    exec(HASH, scope)
    return scope["trajectory_hash"](name, seed, steps)


def test_a_seed_gives_the_same_episode_twice() -> None:
    """Long enough for creatures to vanish, which Crafter itself draws from a set."""
    assert trajectory_hash("crafter", SEED, 60) == trajectory_hash("crafter", SEED, 60)


@pytest.mark.slow
def test_a_seed_gives_the_same_episode_in_another_process() -> None:
    wanted = [("crafter", SEED, 400), ("babyai/putnext", SEED, 64)]
    code = "_ = [object() for _ in range(100_000)]\n"  # other addresses in memory
    code += HASH + f"print(*[trajectory_hash(*each) for each in {wanted}])"
    environment = os.environ | {"PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    other = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=120)
    assert other.stdout.split() == [trajectory_hash(*each) for each in wanted]


def test_the_scripted_policy_leads_random_actions_by_far() -> None:
    found = baselines("crafter", seed=SEED, steps=60)
    assert found.expert >= 4 / 22
    assert found.expert - found.random >= 2 / 22


@pytest.mark.slow
def test_random_actions_achieve_as_much_as_counted_in_crafter_itself() -> None:
    """Within three standard errors, on other episodes; counted without the wrapper."""
    n, steps = 16, 100
    counted, ours = [], []
    for seed in range(n):
        env: Any = crafter.Env(seed=seed, length=steps)
        env.reset()
        draws, ended, info = random.Random(seed + n), False, {"achievements": {}}
        while not ended:
            *_, ended, info = env.step(draws.randrange(17))
        counted.append(sum(count > 0 for count in info["achievements"].values()) / 22)
        episode = opened("crafter", seed=EVALUATION_SEEDS + seed, steps=steps)
        play_out(episode, random_actions(episode, EVALUATION_SEEDS + seed))
        ours.append(episode.progress)
    error = math.sqrt((variance(counted) + variance(ours)) / n)
    print(f"{mean(counted):.4f} counted, {mean(ours):.4f} here, {error:.4f} standard error, {n} episodes each")
    assert 0 < error < 0.02
    assert abs(mean(counted) - mean(ours)) <= 3 * error


@pytest.mark.slow
def test_the_scripted_policy_makes_stone_tools() -> None:
    for seed in range(4):
        episode = opened("crafter", seed=seed, steps=300)
        play_out(episode, episode.expert())
        assert {"make_stone_pickaxe", "collect_coal"} <= set(episode.achieved)
        assert len(episode.achieved) >= 12


def test_an_episode_in_words() -> None:
    episode = opened("crafter", seed=SEED, steps=150)
    said = episode.observation()
    assert said.startswith("You see: ")
    assert "\nStatus: health 9, food 9, drink 9, energy 9." in said
    episode.step(None)
    assert episode.observation().startswith("Your last reply was no action; nothing was done.\n")
    episode.step("noop")
    assert not episode.observation().startswith("Your last")
    assert len(ACTIONS) == 17


def test_facing_is_told_after_every_move() -> None:
    """What `do` will act upon."""
    episode, draws = opened("crafter", seed=SEED, steps=150), random.Random(0)
    for _ in range(30):
        episode.step(draws.choice(["move left", "move right", "move up", "move down"]))
        env = episode.env  # type: ignore[attr-defined]
        material, creature = env._world[env._player.pos + env._player.facing]
        name = type(creature).__name__.lower() if creature is not None else material
        assert f"You face: {name}." in episode.observation()


def test_progress_belongs_to_one_episode() -> None:
    first = opened("crafter", seed=SEED, steps=60)
    play_out(first, first.expert())
    again = opened("crafter", seed=SEED, steps=60)
    assert first.progress > again.progress == 0
    assert first.state() != again.state()
