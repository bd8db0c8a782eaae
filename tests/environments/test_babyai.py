"""BabyAI as text: what is said is what there is, the expert wins, random actions do as well as minigrid says."""

import contextlib
import io
import math
import random
import re
from typing import Any

import numpy as np
import pytest

from dsv3.environments import ENVIRONMENTS, EVALUATION_SEEDS, ask, opened
from dsv3.environments.babyai import ACTIONS, OneRoom, OpenDoor
from dsv3.environments.baselines import baselines, play_out, random_actions

TASKS = [name for name in ENVIRONMENTS if name.startswith("babyai/")]


@pytest.mark.parametrize("name", TASKS)
def test_the_expert_wins_every_episode(name: str) -> None:
    for seed in range(EVALUATION_SEEDS, EVALUATION_SEEDS + 4):
        episode = opened(name, seed=seed, steps=64)
        play_out(episode, episode.expert())
        assert episode.progress == 1, seed


@pytest.mark.slow
@pytest.mark.parametrize("name", TASKS)
def test_the_expert_wins_a_hundred_episodes(name: str) -> None:
    assert all(baselines(name, seed=EVALUATION_SEEDS + i, steps=64).expert == 1 for i in range(100))


def wins_by_chance(task: str, n: int, *, steps: int) -> int:
    """Of n episodes, counted in minigrid without the wrapper."""
    won = 0
    for seed in range(n):
        env: Any = OpenDoor(max_steps=steps) if task == "open" else OneRoom(task, steps=steps)
        with contextlib.redirect_stdout(io.StringIO()):
            env.reset(seed=seed)
        draws, reward, ended = random.Random(seed + n), 0.0, False
        while not ended:
            _, reward, terminated, truncated, _ = env.step(draws.randrange(6))
            ended = terminated or truncated
        won += reward > 0
    return won


@pytest.mark.parametrize(
    ("name", "n"), [("babyai/goto", 24), *(pytest.param(name, 200, marks=pytest.mark.slow) for name in TASKS)]
)
def test_random_actions_succeed_as_often_as_counted_in_minigrid_itself(name: str, n: int) -> None:
    """Within three standard errors, on other episodes: in each a win or none."""
    steps = 32 if n < 100 else 64
    counted = wins_by_chance(name.partition("/")[2], n, steps=steps) / n
    policies = [opened(name, seed=EVALUATION_SEEDS + i, steps=steps) for i in range(n)]
    for i, episode in enumerate(policies):
        play_out(episode, random_actions(episode, EVALUATION_SEEDS + i))
    ours = sum(episode.progress for episode in policies) / n
    mean = (counted + ours) / 2
    assert abs(counted - ours) <= 3 * math.sqrt(2 * mean * (1 - mean) / n)
    print(f"{name}: {counted:.3f} counted, {ours:.3f} here, {n} episodes each")


def test_an_episode_in_words() -> None:
    """A prompt as it stands; and what is said of every object is where the object is."""
    episode = opened("babyai/putnext", seed=EVALUATION_SEEDS + 3, steps=64)
    episode.step("turn right")
    assert ask(episode.rules, [], episode.observation()) == (
        "Mission: put the blue box next to the red box.\n"
        "Actions: turn left, turn right, go forward, pick up, drop, toggle.\n"
        "You see: a red box 4 ahead and 1 right, a blue box 4 ahead and 3 left, a wall 5 ahead, a wall 2 right.\n"
        "Action:"
    )
    env: Any = episode.env  # type: ignore[attr-defined]
    for ahead, right, colour in ((4, 1, "red"), (4, -3, "blue")):
        place = env.agent_pos + ahead * env.dir_vec + right * env.right_vec
        assert env.grid.get(*place).color == colour


def test_an_invalid_action_takes_time_and_is_told() -> None:
    episode = opened("babyai/goto", seed=EVALUATION_SEEDS, steps=3)
    before = episode.observation(), episode.state()
    episode.step(None)
    assert episode.observation() == f"Your last reply was no action; nothing was done.\n{before[0]}"
    assert episode.state() == before[1]
    episode.step("turn left")
    assert "no action" not in episode.observation()
    episode.step(None)
    assert episode.over
    assert episode.progress == 0


def test_running_out_of_steps_is_no_success() -> None:
    """Also in the very step in which the limit is reached."""
    won = opened("babyai/goto", seed=EVALUATION_SEEDS, steps=64)
    needed = len(play_out(won, won.expert()))
    for steps, success in ((needed, 1), (needed - 1, 0)):
        episode = opened("babyai/goto", seed=EVALUATION_SEEDS, steps=steps)
        play_out(episode, episode.expert())
        assert episode.progress == success
        assert episode.over


def test_words_tell_states_apart() -> None:
    """Doors say whether they are open, and what is carried is named."""
    door = opened("babyai/open", seed=EVALUATION_SEEDS, steps=64)
    play_out(door, door.expert())
    assert re.search(r"an open \w+ door 1 ahead, ", door.observation())
    assert re.search(r"a closed \w+ door ", opened("babyai/open", seed=EVALUATION_SEEDS, steps=64).observation())
    carrier = opened("babyai/putnext", seed=EVALUATION_SEEDS, steps=64)
    expert, said = carrier.expert(), ""
    while not carrier.over:
        said += carrier.observation()
        carrier.step(expert())
    assert "You carry: a " in said


def test_a_frame_is_a_picture() -> None:
    frame = opened("babyai/goto", seed=1, steps=4).frame()
    assert frame.dtype == np.uint8
    assert frame.shape[2] == 3
    assert len(ACTIONS) == 6


def test_an_unknown_environment_is_named() -> None:
    with pytest.raises(ValueError, match=r"environment=babyai/go: must be one of .* Did you mean 'babyai/goto'\?"):
        opened("babyai/go", seed=1, steps=4)
