"""Plots of whole runs."""

from pathlib import Path

import pytest

from dsv3.checkpoint.run_folder import RunFolder
from dsv3.reporting.curves import benchmarks
from dsv3.reporting.history import History


def test_error_bars_of_benchmarks_are_intervals_of_accuracies_or_standard_errors(tmp_path: Path) -> None:
    """None right of sixteen has a bar, too."""
    folder = RunFolder(tmp_path)
    for metric, value, stderr in (("exact_match", 0.0, 0.0), ("answer_bpb", 1.5, 0.25)):
        row = {"tokens": 100, "task": "t", "metric": metric, "value": value, "stderr": stderr, "n": 16, "shots": 0.0}
        folder.table("metrics/benchmarks").append(row)
    folder.flush(100)
    (bars,) = benchmarks([History(tmp_path, "run")]).data
    assert bars.error_y.array == pytest.approx([0.2059, 0.25], abs=1e-4)
    assert bars.error_y.arrayminus == pytest.approx([0.0, 0.25])
