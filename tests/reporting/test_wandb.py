"""W&B media: maps and tables with each checkpoint, and a workspace of panels."""

import json
from pathlib import Path

import pytest
import wandb

from dsv3.checkpoint.run_folder import RunFolder
from dsv3.cli import main
from dsv3.training.callbacks.expert_plots import draw
from tests.reporting.made_up import MadeUpRun


def test_pictures_are_maps_and_a_table_of_the_newest_interval(tmp_path: Path) -> None:
    run = MadeUpRun(tmp_path / "run", layers=4, experts=16)
    run.interval()
    run.interval()
    drawn = draw(run.folder)
    assert set(drawn) == {"experts/load", "experts/specialisation", "experts/output_norm", "experts/table"}
    table = drawn.pop("experts/table")
    assert len(table.data) == 4
    assert {"layer", "tokens", "max_vio_interval", "nodes"} <= set(table.columns)
    assert not {"load", "bias", "domains"} & set(table.columns), "arrays are in the maps"
    assert all(isinstance(picture, wandb.Plotly) for picture in drawn.values())
    assert draw(RunFolder(tmp_path / "none")) == {}


def test_workspace_has_every_section_and_tokens_as_its_axis(tmp_path: Path) -> None:
    out = tmp_path / "workspace.json"
    assert main(["dashboard", "wandb", f"out={out}", "project=mine", "entity=team"]) == 0
    text = out.read_text()
    for name in ("Loss", "Balance", "Load of the experts", "Quantisation error (FP8)", "Benchmarks"):
        assert name in text
    for key in ("train/loss", "max_violation", "experts/load", "quantisation/", "benchmarks/"):
        assert key in text
    assert json.loads(text)["project"] == "mine"
    assert '"tokens"' in text


def test_a_workspace_needs_a_key_or_a_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(SystemExit):
        main(["dashboard", "wandb"])
    assert "WANDB_API_KEY is not set" in capsys.readouterr().err


def test_a_folder_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["dashboard", "/nowhere"])
    assert "/nowhere: there is no such folder" in capsys.readouterr().err
