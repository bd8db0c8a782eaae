"""Seeds that `study.until` adds, by runs that are made up."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig

from dsv3.reporting.study_results import headline, read_study
from dsv3.study import evidence
from dsv3.study.rounds import next_round
from dsv3.study.study_parts import planned
from tests.reporting.test_study_results import made

NOISE = (0.0, 0.02, -0.02, 0.01, -0.01, 0.03, -0.03, 0.0)


def settings(**changed: Any) -> dict[str, Any]:
    arms = {"a": ["x=1"], "b": ["x=2"], "c": ["x=3"]}
    study = {"arms": arms, "only": None, "baseline": "a", "seeds": [1, 2], "question": None, "finding": None}
    until = {"half_width": 0.01, "most_seeds": 6, "most_hours": None}
    return {**study, "metric": None, "match": None, "tune": None, "until": until, **changed}


def train(root: Path, stages: list[list[list[str]]]) -> list[tuple[str, int]]:
    """Make up what the runs of a part come to: b is far better than a, c is as good but for noise."""
    runs = []
    for run in (run for stage in stages for run in stage):
        given = dict(override.split("=", 1) for override in run)
        arm, seed = given["study.arm"], int(given["seed"])
        noise = NOISE[seed % len(NOISE)]
        made(root, arm, seed, bpb={"a": 2.0, "b": 1.5 + noise / 100, "c": 2.0 + noise}[arm], arms=settings()["arms"])
        runs.append((arm, seed))
    return runs


def no_configs(job: list[str]) -> DictConfig:
    raise AssertionError("neither matched nor tuned")


def whole(root: Path, study: dict[str, Any]) -> list[list[tuple[str, int]]]:
    return [train(root, part) for part in planned(study, [], no_configs, root)]


def test_seeds_are_added_to_arms_that_are_not_settled_and_to_the_baseline(tmp_path: Path) -> None:
    first, *more = whole(tmp_path, settings())
    assert {seed for _, seed in first} == {1, 2, 3, 4}, "the first look needs four"
    assert more == [[("a", 5), ("c", 5)], [("a", 6), ("c", 6)]], "b is settled, c is not until most_seeds"
    study = read_study(tmp_path, settings())
    settled = {arm: study.difference(headline(study), arm) for arm in "bc"}
    assert [(d.settled, d.seeds) for d in settled.values() if d] == [("difference shown", 4), ("most seeds reached", 6)]
    (errors,) = evidence.errors(study)
    assert [(row[0], row[-1]) for row in errors.rows] == [("b", "difference shown"), ("c", "most seeds reached")]
    assert any("sequential rule" in sentence for sentence in errors.sentences)


def test_a_study_that_was_interrupted_goes_on_as_it_would_have(tmp_path: Path) -> None:
    """Runs of a round that was not ended, or of seeds to come, decide nothing."""
    study = settings(only=["a", "c"])
    parts = planned(study, [], no_configs, tmp_path)
    train(tmp_path, next(parts))
    train(tmp_path, [next(parts)[0][:1]])
    again = planned(study, [], no_configs, tmp_path)
    next(again)
    assert next(again) == [[["x=1", "study.arm=a", "seed=5"], ["x=3", "study.arm=c", "seed=5"]]]


def test_a_wide_half_width_is_reached_at_the_first_look(tmp_path: Path) -> None:
    assert len(whole(tmp_path, settings(only=["a", "c"], until={"half_width": 0.2, "most_seeds": 6}))) == 1


@pytest.mark.parametrize(("hours", "rounds"), [(0.0001, 0), (1.0, 2)])
def test_hours_are_those_of_all_runs_and_of_the_round_to_come(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hours: float, rounds: int
) -> None:
    monkeypatch.setattr("dsv3.study.rounds.hours_of", lambda study, seeds: 0.0001 * len(seeds))
    until = {"half_width": 0.01, "most_seeds": 6, "most_hours": hours}
    assert len(whole(tmp_path, settings(until=until, only=["a", "c"]))) == 1 + rounds


def test_only_some_arms_and_a_seed_of_the_command_line(tmp_path: Path) -> None:
    first, *more = whole(tmp_path, settings(only=["a", "b"]))
    assert ({arm for arm, _ in first}, more) == ({"a", "b"}, [])
    parts = list(planned(settings(), ["seed=9"], no_configs, tmp_path))
    assert parts == [
        [[["x=1", "seed=9", "study.arm=a"], ["x=2", "seed=9", "study.arm=b"], ["x=3", "seed=9", "study.arm=c"]]]
    ]


def test_where_nothing_is_finished_nothing_is_added(tmp_path: Path) -> None:
    assert next_round(tmp_path, settings(), [1, 2, 3, 4]) is None
    assert len(list(planned(settings(), [], no_configs, tmp_path))) == 1
