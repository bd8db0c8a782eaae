"""docs/tour.ipynb runs from its first cell to its last, and shows what it says."""

import json
from pathlib import Path

import pandas as pd
import pytest

from tests.conftest import ROOT


@pytest.mark.slow  # trains twice
@pytest.mark.timeout(1200)
def test_the_tour_runs_and_balancing_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "docs" / "tour.ipynb").read_text(encoding="utf-8"))
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], "outputs are not committed"
            exec("".join(cell["source"]), names)
    comparison = names["comparison"]
    assert isinstance(comparison, pd.DataFrame)
    worst = comparison["MaxVio, worst layer"]
    assert worst["unbalanced"] > worst["standard"]
    assert comparison["held-out bits per byte"].between(1, 5).all()
