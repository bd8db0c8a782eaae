"""Scaling laws: planted ones are found again, intervals cover, and a grid's report says what its runs tell."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from dsv3.checkpoint.run_folder import RunFolder
from dsv3.cli import main
from dsv3.study import parametric_law
from dsv3.study.compute_gain import Sizes, compute_gain
from dsv3.study.isoflop import cells
from dsv3.study.isoflop_minima import Run, envelope, minima
from dsv3.study.parametric_law import Array, estimate, fit, log_loss, refit
from dsv3.study.scaling_results import is_grid
from hydra_plugins.study_sweeper import StudySweeper
from tests.conftest import ROOT
from tests.reporting.test_study_results import made as made_in_study

BUDGETS = (2.5e12, 5e12, 1e13, 2e13)
SIZES = np.array([0.58, 0.92, 1.27, 2.28, 3.71]) * 1e6
COSTS = np.array([4.06, 6.70, 9.13, 16.82, 27.66]) * 1e6
"""FLOPs per token of these sizes."""
PLANTED = np.array([np.log(1.0), np.log(30.0), 0.30, np.log(60.0), 0.35])
TRUTH = {"E": 1.0, "alpha": 0.30, "beta": 0.35, "a": 0.35 / 0.65}
N = np.tile(SIZES, len(BUDGETS))
D = np.repeat(BUDGETS, len(SIZES)) / np.tile(COSTS, len(BUDGETS))


def losses(noise: float, seed: int, *, gain: float = 1.0) -> Array:
    """Of the planted law; gain: factor on tokens, and so on compute, that an arm is better by."""
    random = np.random.default_rng(seed)
    return np.exp(log_loss(PLANTED, N, D * gain) + random.normal(0, noise, len(N)))


def test_a_law_without_noise_is_found_exactly() -> None:
    law = fit(N, D, losses(0, 0), draws=10)
    assert law.theta == pytest.approx(PLANTED, rel=1e-4)
    assert float(law(3.7e6, 3e6)) == pytest.approx(
        float(np.exp(log_loss(PLANTED, 3.7e6 * np.ones(1), 3e6 * np.ones(1)))[0])
    )


def test_a_planted_law_lies_within_its_intervals_and_a_larger_run_too() -> None:
    law = fit(N, D, losses(0.004, 1), draws=300)
    for name, value in TRUTH.items():
        middle, low, high = law.constants()[name]
        assert low <= value <= high, name
        assert low <= middle <= high
    larger, tokens = np.array([3.7e6]), np.array([3e6])
    _, low, high = law.predict(3.7e6, 3e6)
    assert low <= np.exp(log_loss(PLANTED, larger, tokens))[0] <= high
    assert high - low < 0.1


def test_fits_of_draws_are_those_of_scipy() -> None:
    noisy = np.log([losses(0.004, seed) for seed in range(6)])
    drawn = refit(PLANTED, N, D, noisy)
    for y, theta in zip(noisy, drawn, strict=True):
        _, cost = parametric_law._point(N, D, y)
        assert parametric_law.cost(theta, N, D, y) <= cost * 1.02


def test_one_run_that_went_wrong_moves_the_law_little() -> None:
    y = losses(0.002, 2)
    spoilt = y.copy()
    spoilt[7] *= 1.3
    one, other = fit(N, D, y, draws=10), fit(N, D, spoilt, draws=10)
    assert abs(float(one(3.7e6, 3e6)) / float(other(3.7e6, 3e6)) - 1) < 0.01


def test_too_few_runs_are_refused() -> None:
    with pytest.raises(ValueError, match="2 sizes: a law needs 7 runs and 3 sizes"):
        fit([1e6, 2e6] * 4, np.arange(1, 9) * 1e6, np.ones(8))


@pytest.mark.slow
def test_intervals_cover_the_planted_law_in_nineteen_of_twenty_studies() -> None:
    """200 simulated studies, all fitted at once."""
    studies, random = 200, np.random.default_rng(0)
    noisy = log_loss(PLANTED, N, D) + random.normal(0, 0.005, (studies, len(N)))
    points = refit(PLANTED, N, D, noisy)
    larger, tokens = np.array([3.7e6]), np.array([3e6])
    covered: dict[str, list[bool]] = {name: [] for name in (*TRUTH, "a larger run")}
    for theta, y in zip(points, noisy, strict=True):
        residuals = parametric_law.scaled_residuals(theta, N, D, y)
        draws = refit(theta, N, D, log_loss(theta, N, D) + random.choice(residuals, (150, len(N))))
        for name, value in TRUTH.items():
            _, low, high = estimate(theta, draws, name)
            covered[name].append(low <= value <= high)
        low, high = np.quantile(log_loss(draws, larger, tokens)[:, 0] + random.choice(residuals, 150), [0.025, 0.975])
        run = log_loss(PLANTED, larger, tokens)[0] + random.normal(0, 0.005)
        covered["a larger run"].append(bool(low <= run <= high))
    fractions = {name: float(np.mean(hits)) for name, hits in covered.items()}
    print(fractions)
    assert all(0.90 <= fraction <= 0.995 for fraction in fractions.values()), fractions


def grid_runs(noise: float) -> list[Run]:
    y, found = losses(noise, 3), []
    for n, d, cost, budget, loss in zip(N, D, np.tile(COSTS, 4), np.repeat(BUDGETS, 5), y, strict=True):
        flops = np.linspace(0.05, 1, 40) * budget
        curve = np.exp(log_loss(PLANTED, np.full(40, n), flops / cost))
        found.append(Run(n, d, budget, budget, loss, (flops, curve)))
    return found


def test_optimal_sizes_grow_as_the_planted_law_says() -> None:
    """Costs of a token grow as N^1.04 here, so that N grows as C^(beta / (1.04 beta + alpha)) or so."""
    for approach in (envelope, minima):
        found = approach(grid_runs(0.0005))
        assert found is not None
        value, low, high = found.a
        assert low <= value <= high
        assert value == pytest.approx(0.53, abs=0.12)
        assert found.b[0] == pytest.approx(0.47, abs=0.12)


def test_budgets_without_a_minimum_within_their_sizes_tell_nothing() -> None:
    falling = [run._replace(loss=3 - 0.1 * np.log(run.parameters)) for run in grid_runs(0)]
    assert minima(falling) is None
    assert envelope([falling[0]] * 3) is None


@pytest.mark.parametrize("gain", [1.0, 1.5])
def test_a_gain_in_compute_is_found_with_its_interval(gain: float) -> None:
    arm, baseline = fit(N, D, losses(0.002, 100, gain=gain), draws=60), fit(N, D, losses(0.002, 101), draws=60)
    sizes = Sizes(SIZES, COSTS)
    found = compute_gain(arm, baseline, sizes, sizes, (BUDGETS[0], BUDGETS[-1]))
    factor, low, high = found.factor
    assert abs(np.log(factor / gain)) < 0.75 * np.log(high / low), "three standard errors"
    assert np.log(high / low) < 0.15
    assert found.constant


def test_every_cell_of_the_shipped_grid_has_its_budget() -> None:
    job = ["experiment=scaling_law", "precision=bf16"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        study: Any = OmegaConf.to_container(compose("train", overrides=job).study)
        found = cells(lambda overrides: compose("train", overrides=overrides), job, study)
        assert {cell.budget for cell in found} == {2.5e12, 5e12, 1e13, 2e13}
        assert all(abs(cell.flops / cell.budget - 1) < 0.01 for cell in found)
        assert {cell.width for cell in found} == set(study["grid"]["widths"])
        assert all(120 <= cell.steps <= 1000 for cell in found)
        with pytest.raises(ValueError, match=r"model\.dim=8: study\.grid sets the widths and tokens"):
            cells(lambda overrides: compose("train", overrides=overrides), ["model.dim=8"], study)
        with pytest.raises(ValueError, match=r"study\.grid=.*must be lists of positive numbers"):
            cells(lambda overrides: compose("train", overrides=overrides), job, study | {"grid": {"flops": [1e13]}})
        few = study | {"grid": study["grid"] | {"steps": [10, 30], "widths": [256], "flops": [1.19e12]}}
        with pytest.raises(ValueError, match=r"raise study\.grid\.steps"):
            cells(lambda overrides: compose("train", overrides=overrides), job, few)


def test_the_command_of_a_study_reaches_its_grid() -> None:
    sweeper = StudySweeper.__new__(StudySweeper)
    job = ["experiment=scaling_law", "precision=bf16"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        sweeper.config = compose("train", overrides=job)
        sweeper.composed = lambda overrides: compose("train", overrides=overrides)  # type: ignore[method-assign]
        ((runs,),) = sweeper.parts_of([job])
    assert len({tuple(run) for run in runs}) == len(runs) > 10


def made(root: Path, arm: str, run: Run, *, total: float) -> None:
    """A finished run of a grid."""
    folder = RunFolder(root / f"{arm}/d{run.parameters:.0f}-{run.tokens:.0f}/seed1")
    folder.path.mkdir(parents=True)
    study = {"arm": arm, "arms": {"a": [], "b": []}, "baseline": "a", "question": "<b>?", "finding": None}
    study |= {"grid": {"flops": list(BUDGETS)}}
    OmegaConf.save({"seed": 1, "study": study, "run": {"experiment": "made_up", "init_from": None}}, folder.config_path)
    tokens, cost = int(run.tokens), run.flops / run.tokens
    for at, loss in zip(run.curve[0] / cost, run.curve[1], strict=True):
        folder.table("metrics/train").append({"tokens": int(at), "loss": loss, "bpb": loss})
        folder.table("timing/train").append({"tokens": int(at), "seconds": 1.0})
    folder.flush(tokens)
    info = {"parameters": {"total": total, "active": run.parameters}, "flops_per_token": cost, "tokens": tokens}
    info |= {"statistics": [{"name": "loss", "unit": "nats"}, {"name": "bpb", "unit": "bits per byte"}]}
    (folder.path / "run_info.json").write_text(json.dumps(info))
    folder.write_summary({"tokens": tokens, "steps": 9, "validation": {"after": {"all": {"bpb": run.loss}}}})


def test_the_report_of_a_grid(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsv3.study.parametric_law.DRAWS", 50)
    for run in grid_runs(0.002)[::2]:
        made(tmp_path / "study", "a", run, total=run.parameters * 2)
        made(tmp_path / "study", "b", run._replace(loss=run.loss * 0.98), total=run.parameters * 2)
    larger = tmp_path / "larger"
    larger.mkdir()
    (larger / "run_info.json").write_text('{"parameters": {"total": 7.4e6, "active": 3.7e6}, "tokens": 3000000}')
    assert main(["report", str(tmp_path / "study"), f"predict={larger}", "format=json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {name: len(arm["total"]["runs"]) for name, arm in told["arms"].items()} == {"a": 10, "b": 10}
    (predicted,) = told["predictions"]
    truth = float(np.exp(log_loss(PLANTED, np.array([3.7e6]), np.array([3e6])))[0])
    assert predicted["measured"] is None
    assert abs(predicted["loss"]["active"][0] - truth) < 0.03
    assert predicted["loss"]["total"][0] == pytest.approx(predicted["loss"]["active"][0], abs=1e-3)
    assert told["gains"]["b"]["active"]["factor"][1] > 1, "b is better"
    assert json.loads((tmp_path / "study" / "scaling_law.json").read_text())["baseline"] == "a"
    text = (tmp_path / "study" / "report.md").read_text()
    assert "## Laws" in text
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path / "study"), "where=study.arm=c"])
    assert "where=study.arm=c: holds for none of the 20 runs" in capsys.readouterr().err, "it is not passed over"
    assert is_grid(tmp_path / "study")
    made_in_study(tmp_path / "other", "a", 1)
    assert not is_grid(tmp_path), "a run among others makes no grid of them"
    assert "&lt;b>?" in text, "text of a run folder is no markup"
    assert "<b>?" not in (tmp_path / "study" / "report.html").read_text()
    assert (tmp_path / "study" / "report.png").stat().st_size > 10_000
