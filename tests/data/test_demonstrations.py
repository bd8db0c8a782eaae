"""Demonstrations: seeds disjoint from evaluation's, rows that replay to success, the reward that plays plans."""

import json
from pathlib import Path
from typing import Any

import pytest

from data.demonstrations import demonstrations
from data.tools import demonstrate
from dsv3.contracts import Answer
from dsv3.environments import ENVIRONMENTS, EVALUATION_SEEDS, opened, read_plan
from plugins.benchmarks.agents.episodes import load
from plugins.reward.episode import Episode

SETTINGS: dict[str, Any] = {"first_seed": 0, "steps": 64, "history": 0, "weight": 1.0}


def rows(environment: str, form: str, episodes: int = 10, **others: Any) -> list[dict[str, Any]]:
    source = demonstrations(environment=environment, form=form, episodes=episodes, **SETTINGS | others)  # type: ignore[arg-type]
    return [dict(row) for _, row in source.rows()]


def test_seeds_are_never_those_of_evaluation() -> None:
    """All of evaluation's lie above all that demonstrations may have."""
    for name in ENVIRONMENTS:
        assert min(load(environment=name, episodes=100)["test"]["seed"]) >= EVALUATION_SEEDS
    last = demonstrations(
        environment="babyai", form="steps", episodes=2, **SETTINGS | {"first_seed": EVALUATION_SEEDS - 2}
    )
    assert max(row["seed"] for _, row in last.rows()) == EVALUATION_SEEDS - 1
    with pytest.raises(ValueError, match=r"first_seed \+ episodes must be at most 2,000,000,000"):
        demonstrations(
            environment="babyai", form="steps", episodes=3, **SETTINGS | {"first_seed": EVALUATION_SEEDS - 2}
        )
    with pytest.raises(ValueError, match="environment=babyai/go: must be one of"):
        demonstrations(environment="babyai/go", form="steps", episodes=3, **SETTINGS)


def test_steps_replay_to_success() -> None:
    """The questions are what an agent is asked in these states, and the replies win all five task types."""
    found = rows("babyai", "steps")
    assert {row["environment"] for row in found} == {name for name in ENVIRONMENTS if name.startswith("babyai/")}
    for seed in range(10):
        own = [row for row in found if row["seed"] == seed]
        episode = opened(own[0]["environment"], seed=seed, steps=64)
        for row in own:
            question, reply = (message["content"] for message in row["messages"])
            assert f"\n{episode.observation()}\nAction:" in question
            episode.step(reply)
        assert episode.progress == 1
        assert {row["held_out"] for row in own} == {seed == 0}
    assert rows("babyai", "steps") == found


def test_history_is_asked_with() -> None:
    second = [row for row in rows("babyai/putnext", "steps", 1, history=2) if row["seed"] == 0][1]
    assert second["messages"][0]["content"].count("You see:") == 2


def answer(text: str, row: dict[str, Any], *, ended: bool = True) -> Answer:
    return Answer(row["prompt"], text, [], ended, row)


def test_the_reward_plays_the_plan() -> None:
    plans, asked = rows("babyai", "plans", 5), rows("babyai", "prompts", 5)
    assert [row["prompt"] for row in asked] == [row["messages"][0]["content"] for row in plans]
    told = [row["messages"][1]["content"] for row in plans]
    reward = Episode()
    assert reward([answer(text, row) for text, row in zip(told, asked, strict=True)]) == [1.0] * 5
    assert reward([answer(text, row, ended=False) for text, row in zip(told, asked, strict=True)]) == [0.0] * 5
    for text in ("", "jump", "drop, " * 100_000, "turn left" * 500, told[0][: len(told[0]) // 2] + "; exit()"):
        assert reward([answer(text, asked[3])]) == [0.0]
    assert read_plan(told[0], opened("babyai/goto", seed=0, steps=1).actions).count(None) == 0


def test_crafters_script_demonstrates_too(tmp_path: Path) -> None:
    """Its rows replay to what it achieved, on the same episode."""
    out = tmp_path / "d.jsonl"
    options = demonstrate.Options(env="crafter", episodes=1, out=str(out), steps=40, first_seed=5)
    assert demonstrate.run(options)["rows"] == 40
    episode = opened("crafter", seed=5, steps=40)
    for row in map(json.loads, out.read_text().splitlines()):
        question, reply = (message["content"] for message in row["messages"])
        assert episode.observation() in question
        episode.step(reply)
    assert {"collect_wood", "place_table"} & set(episode.achieved)


def test_rows_of_turns_leave_the_episode_to_the_policy() -> None:
    steps, turns = rows("babyai", "steps", 5), rows("babyai", "turns", 5, history=3)
    for row in turns:
        first = next(step for step in steps if step["seed"] == row["seed"])
        assert row["prompt"] == first["messages"][0]["content"]
        assert (row["form"], row["steps"], row["history"], row["verifier"]) == ("turns", 64, 3, "episode")


def test_rows_are_written_to_a_file(tmp_path: Path) -> None:
    out = tmp_path / "new" / "d.jsonl"
    options = demonstrate.Options(env="babyai/goto", episodes=3, out=str(out), form="plans")
    assert demonstrate.run(options)["rows"] == 3
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows("babyai/goto", "plans", 3)
