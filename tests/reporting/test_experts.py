"""Plots of experts."""

from pathlib import Path

import numpy as np

from dsv3.reporting import experts
from dsv3.reporting.history import History


def test_chance_gives_pairs_a_lift_of_one() -> None:
    """Three experts of ten tokens each; every two of them served five together."""
    even = np.array([[10.0, 5.0, 5.0], [5.0, 10.0, 5.0], [5.0, 5.0, 10.0]])
    assert np.allclose(experts.lift(even)[~np.eye(3, dtype=bool)], 1.0)
    assert np.isnan(np.diag(experts.lift(even))).all()
    unused = np.array([[4.0, 4.0, 0.0], [4.0, 4.0, 0.0], [0.0, 0.0, 0.0]])
    assert experts.lift(unused)[0, 1] == 1.0
    assert experts.lift(unused)[0, 2] == 0.0


def test_a_dense_model_is_told_from_one_that_has_just_begun(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("{}")
    run = History(tmp_path, "x")
    assert "is over yet" in experts.load(run).layout.annotations[0].text
    (tmp_path / "run_info.json").write_text('{"experts": 0}')
    assert "this model has no experts" in experts.load(run).layout.annotations[0].text
