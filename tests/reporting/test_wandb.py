"""W&B media: maps and tables with each checkpoint, and a workspace of panels."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from dsv3.cli import main
from dsv3.reporting.history import History
from dsv3.reporting.workspace import MAPS, NAME, SUMMARY
from dsv3.training.callbacks.expert_plots import draw, summary
from tests.reporting.made_up import MadeUpRun
from tests.stand_in import JSONHandler, answering


def test_pictures_are_maps_and_a_table_of_the_newest_interval(tmp_path: Path) -> None:
    run = MadeUpRun(tmp_path / "run", layers=4, experts=16)
    run.interval()
    run.interval()
    history = History(run.path, "run")
    drawn = draw(history)
    assert set(drawn) == {*(f"experts/{name}" for name in MAPS), "experts/table"}
    table = drawn.pop("experts/table")
    assert len(table.data) == 4
    assert {"layer", "tokens", "max_vio_interval", "nodes"} <= set(table.columns)
    assert not {"load", "bias", "domains"} & set(table.columns), "arrays are in the maps"
    assert all(isinstance(picture, wandb.Plotly) for picture in drawn.values())
    assert draw(History(tmp_path / "none", "none")) == {}
    figures = summary(history)
    assert {f"summary/{name}" for name in SUMMARY} <= set(figures)
    assert figures["summary/health"].startswith("All 64 experts in 4 layers get tokens")
    assert figures["summary/max_vio"] == history.newest("metrics/routing").max_vio_interval.max()


def test_workspace_has_every_section_and_tokens_as_its_axis(tmp_path: Path) -> None:
    out = tmp_path / "workspace.json"
    assert main(["dashboard", "wandb", f"out={out}", "project=mine", "entity=team"]) == 0
    text = out.read_text()
    for name in ("Summary", "Loss", "Balance", "Load of the experts", "Quantisation error (FP8)", "Benchmarks"):
        assert name in text
    for key in (
        "train/loss",
        "max_violation",
        "experts/load_over_tokens",
        "tokens_per_second",
        "dispatch_bytes",
        "summary/held_out_bpb",
        "quantisation/",
        "benchmarks/",
    ):
        assert key in text
    assert json.loads(text)["project"] == "mine"
    assert '"tokens"' in text


@pytest.fixture
def forgotten() -> Iterator[None]:
    """W&B keeps the key and the address that it saw first in this process."""
    yield
    wandb.teardown()


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch, forgotten: None) -> Iterator[list[dict[str, Any]]]:
    """The views that were saved on a server that answers as W&B's does."""
    views: list[dict[str, Any]] = []

    class Answers(JSONHandler):
        def do_POST(self) -> None:
            content = self.content()
            asked = json.loads(content) if self.path == "/graphql" else {}  # elsewhere it reports on itself
            data: dict[str, Any] = {"viewer": {"id": "1", "entity": "team", "username": "ada", "flags": "{}"}}
            data["viewer"] |= {"email": "ada@example.org", "teams": {"edges": []}}
            if "upsertView" in asked.get("query", ""):
                views.append(asked["variables"])
                data = {"upsertView": {"view": {"id": "1", "name": "nw-new-v"}, "inserted": True}}
            self.answer({"data": data})

    with answering(Answers) as url:
        monkeypatch.setenv("WANDB_BASE_URL", url)
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        yield views


def test_a_workspace_is_saved_on_the_server(saved: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dashboard", "wandb", "project=mine"]) == 0
    (view,) = saved
    assert (view["entityName"], view["projectName"], view["displayName"]) == ("team", "mine", NAME)
    sections = json.loads(view["spec"])["section"]["panelBankConfig"]["sections"]
    names = [section["name"] for section in sections if section["panels"]]
    assert names == ["Summary", "Loss", "Balance", "Load of the experts", "Quantisation error (FP8)", "Benchmarks"]
    assert "/team/mine?nw=new" in capsys.readouterr().out


def test_a_workspace_needs_a_key_or_a_file(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(SystemExit):
        main(["dashboard", "wandb"])
    assert "WANDB_API_KEY is not set" in capsys.readouterr().err


@pytest.mark.usefixtures("forgotten")
def test_a_key_that_is_none_is_no_defect(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(SystemExit):
        main(["dashboard", "wandb"])
    told = capsys.readouterr().err
    assert "WANDB_API_KEY invalid" in told
    assert "defect" not in told


def test_a_folder_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["dashboard", "/nowhere"])
    assert "/nowhere: there is no such folder" in capsys.readouterr().err
