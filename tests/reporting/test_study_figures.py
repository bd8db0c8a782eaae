"""Figures of a study: where its curves are compared, and its differences there."""

import numpy as np
import pytest

from dsv3.reporting import study_figures
from dsv3.reporting.study_figures import gap, interval, shared_points
from dsv3.reporting.study_results import Study
from dsv3.study.report import inert, marked_up

CURVES = {  # (arm, seed) -> points of a budget, bits per byte
    ("a", 1): ([0, 10, 20, 30], [8.0, 4.0, 3.0, 2.0]),
    ("a", 2): ([0, 10, 20, 30], [8.0, 5.0, 4.0, 3.0]),
    ("b", 1): ([0, 12, 24], [8.0, 3.0, 2.0]),
    ("b", 2): ([0, 12, 24], [8.0, 4.5, 3.0]),
    ("slow", 1): ([0, 40, 50], [8.0, 3.0, 2.0]),
    ("slow", 2): ([0, 40, 50], [8.0, 3.0, 2.0]),
}


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Study:
    def curve(run: object, budget: str) -> tuple[np.ndarray, np.ndarray]:
        x, y = CURVES[run]  # type: ignore[index]
        return np.array(x, dtype=float), np.array(y)

    monkeypatch.setattr(study_figures, "curve", curve)
    runs = {arm: {seed: (arm, seed) for seed in (1, 2)} for arm in ("a", "b", "slow")}
    return Study("made up", "", "", None, "a", "a", runs, [], {})  # type: ignore[arg-type]


def test_points_lie_on_every_curve_and_leave_out_the_untrained() -> None:
    curves = [(np.array(x, dtype=float), np.array(y)) for (arm, _), (x, y) in CURVES.items() if arm != "slow"]
    assert shared_points(*curves).tolist() == [12, 20, 24]


def test_differences_are_paired_by_seed_and_read_straight_between_validations(study: Study) -> None:
    points, differences = gap(study, "b", "tokens", np.nan)
    assert points.tolist() == [12, 20, 24]
    by_hand = [(3 - 3.8, 4.5 - 4.8), (3 - 2 / 3 - 3, 4.5 - 1 - 4), (2 - 2.6, 3 - 3.6)]
    assert [d.mean for d in differences] == pytest.approx([sum(pair) / 2 for pair in by_hand])
    means, lows, highs = interval(differences)
    assert (lows <= means).all()
    assert (highs >= means).all()
    assert highs[2] - lows[2] == pytest.approx(0, abs=1e-9), "both seeds differ by as much"
    assert highs[0] - lows[0] == pytest.approx(2 * 12.7062 * 0.25, rel=1e-4), "t of one degree, spread .5 / sqrt(2)"


def test_arms_are_compared_with_the_baseline_and_keep_their_colours(study: Study) -> None:
    assert study.compared() == [(1, "b"), (2, "slow")]


def test_runs_whose_validations_share_no_point_have_no_differences_to_draw(study: Study) -> None:
    points, differences = gap(study, "slow", "seconds", np.nan)
    assert (points.size, differences) == (0, [])
    assert [ends.size for ends in interval(differences)] == [0, 0, 0]


def test_backquotes_are_code_stars_are_bold_and_the_rest_is_no_markup() -> None:
    assert marked_up("`a < b` & **c**") == "<code>a &lt; b</code> &amp; <strong>c</strong>"


def test_text_from_a_run_folder_is_no_markup_in_markdown() -> None:
    shown = inert("<img src=x onerror=alert(1)> | [a](javascript:b)\n# c")
    assert shown == "&lt;img src=x onerror=alert(1)> \\| \\[a\\](javascript:b) # c"
