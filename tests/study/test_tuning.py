"""Tuning by successive halving, on runs that are made up."""

from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf

from dsv3.checkpoint.run_folder import RunFolder
from dsv3.reporting.study_results import read_study
from dsv3.study import evidence
from dsv3.study.study_parts import planned
from dsv3.study.tuning import FIRST_SEED, read_tuning
from tests.reporting.test_study_results import made

BEST = {"a": 2e-3, "b": 4e-3}
"""Learning rate with which an arm is best; a's is its own."""
ARMS: dict[str, list[str]] = {"a": ["x=1"], "b": ["x=2"]}
STUDY: dict[str, Any] = {
    "arms": ARMS, "only": None, "baseline": "a", "seeds": [1, 2], "question": None, "finding": None, "metric": None,
    "match": None, "tune": {"rate": [1e-3, 2e-3, 4e-3, 8e-3]}, "until": None,
}  # fmt: skip


class Runs:
    """Trains by a formula: an arm's loss is the worse the farther its rate is from the best one."""

    def __init__(self, root: Path, *, fails: bool = False) -> None:
        self.root, self.fails = root, fails
        self.trained: list[DictConfig] = []

    def compose(self, job: list[str]) -> DictConfig:
        config = OmegaConf.create(
            {"run": {"tokens": 800, "dir": "${root}/${study.arm}/seed${seed}"}, "rate": 2e-3, "seed": 1, "x": 0}
            | {"root": str(self.root), "study": {"arm": None, "tuned": None}}
        )
        for override in job:
            key, _, value = override.partition("=")
            OmegaConf.update(config, key, OmegaConf.create(f"v: {value}").v)
        return config

    def train(self, stages: list[list[list[str]]]) -> list[DictConfig]:
        configs = [self.compose(run) for stage in stages for run in stage]
        for config in configs:
            arm = "ab"[config.x - 1]
            bpb = 2 + abs(config.rate - BEST[arm]) * 10
            study = {"tuned": config.study.tuned}
            settings = {"study": {"arm": config.study.arm, "arms": ARMS, "baseline": "a", "metric": None} | study}
            settings["study"] |= {"question": None, "finding": None}
            failed = self.fails and config.study.tuned == "trial"
            made(self.root, config.study.arm, config.seed, bpb=bpb, finished=not failed, settings=settings)
        self.trained += configs
        return configs


def whole(root: Path, **changed: Any) -> Runs:
    runs = Runs(root, **changed)
    for part in planned(STUDY, [], runs.compose, root):
        runs.train(part)
    return runs


def test_candidates_are_halved_on_seeds_and_tokens_of_their_own(tmp_path: Path) -> None:
    runs = whole(tmp_path)
    trials = [config for config in runs.trained if config.study.tuned == "trial"]
    rungs = [(config.seed, config.run.tokens) for config in trials]
    assert rungs == [(FIRST_SEED, 100)] * 8 + [(FIRST_SEED + 1, 200)] * 4
    tuned = {arm.arm: arm for arm in read_tuning(tmp_path)}
    assert {name: dict(arm.best) for name, arm in tuned.items()} == {"a": {"rate": 2e-3}, "b": {"rate": 4e-3}}
    assert tuned["b"].own == {"rate": 2e-3}
    assert tuned["b"].tokens == 4 * 100 + 2 * 200
    assert {config.rate for config in trials[8:10]} == {2e-3, 1e-3}, "the better half of a"


def test_a_study_trains_its_arms_as_they_are_and_those_that_tuning_changed(tmp_path: Path) -> None:
    runs = whole(tmp_path)
    others = [(c.study.arm, c.study.tuned, c.rate) for c in runs.trained if c.study.tuned != "trial" and c.seed == 1]
    assert others == [("a", None, 2e-3), ("b", None, 2e-3), ("b_best", "best", 4e-3)]
    study = read_study(tmp_path, STUDY)
    assert list(study.runs) == ["a", "b"], "trials and tuned runs are no arms of their own"
    (section,) = evidence.tuning(study)
    assert "12 short runs of 1,600 tokens" in section.sentences[0]
    assert [row[:3] for row in section.rows] == [("a", "rate=0.002", "rate=0.002"), ("b", "rate=0.002", "rate=0.004")]
    assert "b: equal to a with every seed" in section.sentences[1], "b at its best is as good as a"
    assert study.values(next(iter(_metrics(study))), "b", [1]) == [2 + 2e-3 * 10], "and as it is written it is not"


def _metrics(study: Any) -> Any:
    from dsv3.reporting.study_results import metrics

    return metrics(study)


def test_where_every_short_run_fails_an_arm_keeps_its_own_values(tmp_path: Path) -> None:
    runs = whole(tmp_path, fails=True)
    assert [arm.changed for arm in read_tuning(tmp_path)] == [False, False]
    assert {c.study.tuned for c in runs.trained} == {"trial", None}


@pytest.mark.parametrize("until", [{"half_width": 0.1, "most_seeds": 5}])
def test_tuned_arms_get_as_many_seeds_as_they_need(tmp_path: Path, until: dict[str, Any]) -> None:
    runs = Runs(tmp_path)
    for part in planned({**STUDY, "until": until}, [], runs.compose, tmp_path):
        runs.train(part)
    assert {c.seed for c in runs.trained if c.study.tuned == "best"} == {1, 2, 3, 4}
    assert RunFolder(tmp_path / "b_best" / "seed4").summary() is not None
