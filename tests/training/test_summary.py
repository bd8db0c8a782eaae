"""Summary of a finished run."""

from pathlib import Path

import pytest

from dsv3.checkpoint.run_folder import RunFolder
from dsv3.training.summary import accuracy_text, balance_text, show


def test_layers_without_tokens_have_no_violation() -> None:
    assert balance_text({"layers.1": 0.5, "layers.2": 1.5}).endswith("1.00 (worst layer 1.50)")
    assert balance_text({"layers.1": 0.5, "layers.2": None}).endswith("0.50 (worst layer 0.50)")
    assert balance_text({"layers.1": None}) == "no tokens came to the experts"
    assert balance_text({}) == "no experts"


def test_mtp_modules_without_tokens_have_no_accuracy() -> None:
    assert accuracy_text({"mtp1_accuracy": 0.25, "mtp2_accuracy": None}) == "mtp1_accuracy 0.250"
    assert accuracy_text({"mtp1_accuracy": None}) == accuracy_text({}) == "none"


def test_a_report_that_ctrl_c_prevented_is_written_when_the_command_is_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder(tmp_path / "run")
    counts = {"parameters": {"total": 1, "active": 1, "mtp": 0}, "tokens": 1, "steps": 1, "tokens_per_second": 1.0}
    nothing = {"questions": {}, "benchmarks": [], "samples": [], "max_violation": {}, "mtp_accuracy": {}}
    folder.write_summary({"run": str(folder.path), "validation": {"after": {}}, **counts, **nothing})
    drawn: list[Path] = []
    monkeypatch.setattr("dsv3.training.summary.write_run_report", drawn.append)
    show(folder)
    (folder.path / "report.html").touch()
    show(folder)
    assert drawn == [folder.path]
