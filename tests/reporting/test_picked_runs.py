"""Runs picked by conditions, and reports over runs that no study planned."""

from pathlib import Path
from typing import Any

import pytest

from dsv3.cli import main
from dsv3.reporting.history import History, find_runs
from dsv3.reporting.picked_runs import by_settings, picked
from dsv3.reporting.study_results import read_study
from tests.reporting.test_study_results import made

PARTS = {
    "loss_free": {
        "_target_": "plugins.balancing.loss_free.LossFree",
        "n_experts": 4,
        "gamma": {"_target_": "plugins.schedule.piecewise.Piecewise", "peak": 0.5},
    },
    "none": {"_target_": "plugins.balancing.base.Unbalanced"},
}


def sweep(root: Path, name: str, seed: int, *, bpb: float = 2.0, **settings: Any) -> None:
    """A run of a sweep: it knows no arms."""
    made(root, "a", seed, name=f"{name}/seed{seed}", bpb=bpb, arms=None, settings=settings)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp_path = tmp_path_factory.mktemp("sweep")
    for seed in (1, 2):
        sweep(tmp_path, "slow", seed, bpb=2.0 + seed / 100, schedule={"peak": 0.001}, balancing=PARTS["loss_free"])
        sweep(tmp_path, "fast", seed, bpb=1.5 + seed / 90, schedule={"peak": 0.002}, balancing=PARTS["loss_free"])
    sweep(tmp_path, "other", 1, bpb=1.9, schedule={"peak": 0.001}, balancing=PARTS["none"])
    return tmp_path


def names(runs: list[History]) -> list[str]:
    return [run.name for run in runs]


@pytest.mark.parametrize(
    ("where", "found"),
    [
        ("balancing=none", ["other/seed1"]),
        ("balancing=Unbalanced", ["other/seed1"]),
        ("balancing!=loss_free", ["other/seed1"]),
        ("balancing=loss_free, schedule.peak=2e-3", ["fast/seed1", "fast/seed2"]),
        ("seed<2, schedule.peak<=0.001", ["other/seed1", "slow/seed1"]),
        ("bpb>=2.0", ["slow/seed1", "slow/seed2"]),
        ("state=finished , seed=2", ["fast/seed2", "slow/seed2"]),
        ("run=other/seed1", ["other/seed1"]),
    ],
)
def test_conditions_on_settings_options_and_figures(root: Path, where: str, found: list[str]) -> None:
    assert names(picked(find_runs(root), where)) == found


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("balancing", "where=balancing: must be KEY=VALUE"),
        ("seed=1 seed=2", "holds for none of the 5 runs; seed is 1, 2"),
        ("sede=1", "no run has a key sede. Did you mean 'seed'?"),
        ("balancing=../../x", "holds for none of the 5 runs; balancing is loss_free, none"),
        ("balancing=v3", "holds for none of the 5 runs; balancing is loss_free, none"),
        ("balancing=[", "holds for none"),
    ],
)
def test_mistakes_in_conditions(root: Path, where: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["report", str(root), f"where={where}"])
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_runs_of_a_sweep_are_arms_by_the_settings_in_which_they_differ(root: Path) -> None:
    study = read_study(root, where="balancing=loss_free", baseline="peak=0.001")
    assert {arm: sorted(runs) for arm, runs in study.runs.items()} == {"peak=0.002": [1, 2], "peak=0.001": [1, 2]}
    assert study.overrides["peak=0.002"] == "schedule.peak=0.002"
    assert study.baseline == "peak=0.001"
    assert set(read_study(root).runs) == {
        "peak=0.002, balancing=LossFree", "peak=0.001, balancing=LossFree", "peak=0.001, balancing=Unbalanced",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"baseline=peak=3: must be one of peak=0\.002, peak=0\.001"):
        read_study(root, where="balancing=loss_free", baseline="peak=3")


def test_a_repeated_run_is_named_and_left_out(tmp_path: Path) -> None:
    for name in ("again", "first"):
        sweep(tmp_path, name, 1, schedule={"peak": 0.001})
    sweep(tmp_path, "other", 1, schedule={"peak": 0.002})
    arms = by_settings(find_runs(tmp_path))
    assert arms.repeated == ["first/seed1"]
    assert [run.name for run in arms.runs["peak=0.001"].values()] == ["again/seed1"]


def test_an_arm_with_many_settings_is_named_by_its_folder(tmp_path: Path) -> None:
    for name in ("x", "y"):
        sweep(tmp_path, name, 1, **{f"key{i}": f"{name}{i}" for i in range(9)})
    assert list(by_settings(find_runs(tmp_path)).runs) == ["x", "y"]


def test_a_report_over_a_sweep(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(root), "where=balancing=loss_free", "baseline=peak=0.001"]) == 0
    assert "By held-out text at equal tokens, peak=0.002 is better than peak=0.001 by 0.4983" in capsys.readouterr().out
    text = (root / "report.md").read_text()
    assert "| peak=0.002 | schedule.peak=0.002 | 1, 2 |" in text
    assert "where `balancing=loss_free`: 4 finished runs of 2 arms" in text
    with pytest.raises(SystemExit):
        main(["report", str(root / "slow" / "seed1"), "where=seed=1", "metric=x"])
    assert "is one run: where and metric are for more" in capsys.readouterr().err
