"""Playing many episodes with one model: actions, invalid replies, history, seeds, going on after a kill."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dsv3.environments import EVALUATION_SEEDS, opened
from dsv3.evaluation.agents.journal import Journal
from dsv3.evaluation.agents.play import Game, play


class Scripted:
    """Replies by a rule; keeps what it was asked."""

    def __init__(self, *replies: str, at_once: int = 32, room: int = 10_000) -> None:
        self.rule, self.at_once, self.room = replies, at_once, room
        self.asked: list[list[str]] = []

    def replies(self, prompts: Sequence[str], seeds: Sequence[int], temperature: float) -> list[str]:
        self.asked.append(list(prompts))
        return [self.rule[len(prompt) % len(self.rule)] for prompt in prompts]

    def action_scores(self, prompts: Sequence[str], actions: Sequence[Sequence[str]]) -> list[list[float]]:
        self.asked.append(list(prompts))
        return [
            [-float((len(prompt) + 7 * i) % 5) for i in range(len(legal))] for prompt, legal in zip(prompts, actions)
        ]

    def fits(self, prompt: str) -> bool:
        return len(prompt) <= self.room


def games(n: int, name: str = "babyai/goto", **settings: Any) -> list[Game]:
    how = {"steps": 6, "history": 0, "actions": "text"} | settings
    return [Game(name, EVALUATION_SEEDS + i, **how) for i in range(n)]


def test_replies_are_actions_or_counted_as_invalid() -> None:
    (found,) = play(games(1), Scripted("I go on"))
    assert (found["steps"], found["invalid"], found["progress"]) == (6, 6, 0)
    assert [step["action"] for step in found["trajectory"]] == [None] * 6
    assert all("no action" in step["observation"] for step in found["trajectory"][1:])
    (found,) = play(games(1), Scripted(" Go forward."))
    assert found["invalid"] == 0
    assert [step["action"] for step in found["trajectory"]] == ["go forward"] * found["steps"]


def test_the_likeliest_legal_action_is_taken() -> None:
    (found,) = play(games(1, actions="likelihood"), Scripted())
    for step in found["trajectory"]:
        assert step["action"] == max(step["log_likelihoods"], key=step["log_likelihoods"].get)
        assert len(step["log_likelihoods"]) == 6


def test_episodes_share_calls_and_do_not_depend_on_each_other() -> None:
    """The same trajectories, one after the other and together; calls hold as many prompts as they may."""
    together = Scripted(" turn left", " go forward", at_once=8)
    found = play(games(20), together)
    assert [len(call) for call in together.asked[:3]] == [8, 8, 4]
    assert found[0]["trajectory"][0]["rows"] == 8
    alone = [play([game], Scripted(" turn left", " go forward"))[0] for game in games(20)]
    assert [one["trajectory_hash"] for one in found] == [one["trajectory_hash"] for one in alone]
    assert len({one["trajectory_hash"] for one in found}) == 20


@pytest.mark.parametrize("actions", ["text", "likelihood"])
def test_a_trajectory_is_what_its_actions_make_of_its_seed(actions: str) -> None:
    """Replayed, the actions give the same observations and the same progress."""
    (found,) = play(games(1, "babyai/putnext", actions=actions), Scripted("turn left", "go forward", "nonsense"))
    episode = opened("babyai/putnext", seed=EVALUATION_SEEDS, steps=6)
    for step in found["trajectory"]:
        assert step["observation"] == episode.observation()
        episode.step(step["action"])
    assert found["progress"] == episode.progress


def test_history_is_what_fits() -> None:
    player = Scripted(" turn left")
    (found,) = play(games(1, history=2), player)
    assert [step["history"] for step in found["trajectory"]] == [0, 1, 2, 2, 2, 2]
    assert player.asked[1][0].count("Action: turn left") == 1
    assert player.asked[5][0].count("You see:") == 3
    narrow = Scripted(" turn left", room=200)
    (found,) = play(games(1, history=5), narrow)
    assert max(step["history"] for step in found["trajectory"]) < 5
    assert all(len(prompt) <= 200 for (prompt,) in narrow.asked)


def test_sampled_actions_follow_from_the_seed() -> None:
    hot = games(6, actions="likelihood", temperature=2.0)
    first, again = ([one["trajectory_hash"] for one in play(hot, Scripted(at_once=n))] for n in (1, 32))
    assert first == again
    other = [game._replace(draws=1) for game in hot]
    assert [one["trajectory_hash"] for one in play(other, Scripted())] != first


def test_an_interrupted_evaluation_goes_on_where_it_was(tmp_path: Path) -> None:
    """Killed amid its steps, and with a torn line, it asks for what is missing alone, and comes to the same results."""
    path = tmp_path / "tasks" / "journal.jsonl"
    asked = games(3, "babyai/open", steps=40, history=2)
    uninterrupted = Scripted(" turn left", " go forward")
    whole = play(asked, uninterrupted)

    class Killed(Scripted):
        def replies(self, *arguments: Any) -> list[str]:
            if len(self.asked) == 30:
                raise KeyboardInterrupt
            return super().replies(*arguments)

    with pytest.raises(KeyboardInterrupt):
        play(asked, Killed(" turn left", " go forward"), journal=Journal(path))
    assert [len(Journal(path).steps(game)) for game in asked] == [24, 24, 24]
    path.write_bytes(path.read_bytes()[:-40])  # the last game's last steps are torn
    assert [len(Journal(path).steps(game)) for game in asked] == [24, 24, 16]
    player = Scripted(" turn left", " go forward")
    found = play(asked, player, journal=Journal(path))
    assert [len(call) for call in player.asked] == [3] * 16 + [1] * 8
    assert found == [
        json.loads(json.dumps(one)) | {"trajectory": found[i]["trajectory"]} for i, one in enumerate(whole)
    ]
    assert [one["trajectory_hash"] for one in found] == [one["trajectory_hash"] for one in whole]
    idle = Scripted()
    assert play(asked, idle, journal=Journal(path)) == json.loads(json.dumps(found))
    assert not idle.asked


def test_games_with_other_settings_are_not_taken_from_a_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    play(games(1), Scripted(" turn left"), journal=Journal(path))
    assert Journal(path).result(games(1)[0]) is not None
    assert Journal(path).result(games(1, history=1)[0]) is None
    assert Journal(path).result(games(1, steps=7)[0]) is None
