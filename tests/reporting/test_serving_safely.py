"""The dashboard answers its own page alone, and finds runs in any tree of folders."""

import logging
import shutil
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
import pytest

from dsv3.reporting.dashboard.application import build_app
from dsv3.reporting.dashboard.elements import graph
from dsv3.reporting.dashboard.read_ahead import ReadAhead
from dsv3.reporting.dashboard.watched import Watched
from dsv3.reporting.history import find_runs
from dsv3.reporting.style import NO_UPLOAD
from tests.reporting.made_up import MadeUpRun


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    run = MadeUpRun(root / "study" / "seed1", layers=2, experts=4)
    run.interval()
    return root


def test_a_foreign_host_name_is_refused_and_no_page_may_frame_it(root: Path) -> None:
    client = build_app(root).server.test_client()
    for host in ("attacker.example", "attacker.example:8050", "127.0.0.1.attacker.example"):
        assert client.get("/", headers={"Host": host}).status_code == 403
        assert client.get("/_dash-layout", headers={"Host": host}).status_code == 403
    for host in ("127.0.0.1:8050", "localhost", "[::1]:8050"):
        answer = client.get("/", headers={"Host": host})
        assert answer.status_code == 200
        policy = answer.headers["Content-Security-Policy"]
        assert "frame-ancestors 'none'" in policy
        assert "unsafe" not in policy.partition("script-src")[2].partition(";")[0], "the page's own scripts alone"


def test_a_page_of_our_own_has_its_tables_read_before_its_scripts_have_loaded(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    monkeypatch.setattr(Watched, "read", lambda self, name: read.append(name))
    monkeypatch.setattr(ReadAhead, "begin", lambda self, work: work())
    client = build_app(root).server.test_client()
    client.get("/?run=study/seed1", headers={"Host": "attacker.example"})
    client.get("/_dash-layout", headers={"Host": "localhost"})
    assert read == []
    client.get("/?run=study/seed1", headers={"Host": "localhost"})
    client.get("/", headers={"Host": "localhost"})
    assert read == ["study/seed1", ""]


def test_a_question_pauses_reading_ahead_when_it_comes_and_when_it_is_answered(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paused: list[None] = []
    monkeypatch.setattr(ReadAhead, "pause", lambda self: paused.append(None))
    build_app(root).server.test_client().get("/_dash-layout", headers={"Host": "localhost"})
    assert len(paused) == 2


def test_of_a_run_and_else_of_the_newest_the_large_tables_are_read(root: Path) -> None:
    for name in ("study/seed1", "", "no such run"):
        watched = Watched(root)
        watched.read(name)
        run = watched.look()["study/seed1"]
        assert {"train", "validation of live"} <= run._kept.keys()
        assert len(run._routing.layers) == 2
    (root / "empty").mkdir()
    Watched(root / "empty").read("")


def test_links_that_lead_back_are_followed_once(root: Path, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(root / "study", tree / "a")
    (tree / "a" / "up").symlink_to(tree)
    (tree / "again").symlink_to(tree / "a")
    assert [run.name for run in find_runs(tree)] == ["a/seed1"]


def test_a_folder_that_may_not_be_read_is_named_and_left_out(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(root / "study", tree / "open")
    (tree / "closed").mkdir()
    listed = Path.iterdir

    def refused(self: Path) -> Any:
        if self.name == "closed":
            raise PermissionError(13, "Permission denied")
        return listed(self)

    monkeypatch.setattr(Path, "iterdir", refused)
    with caplog.at_level(logging.WARNING):
        assert [run.name for run in find_runs(tree)] == ["open/seed1"]
    assert f"{tree / 'closed'} is left out: Permission denied" in caplog.text


def test_no_plot_has_a_button_that_uploads_it() -> None:
    buttons = {"sendChartToCloud", "sendDataToCloud"}
    assert buttons <= set(NO_UPLOAD["modeBarButtonsToRemove"])
    assert NO_UPLOAD["plotlyServerURL"] == ""
    drawn = graph("loss", "seed1", go.Figure())
    assert buttons <= set(drawn.config["modeBarButtonsToRemove"])
    assert drawn.config["plotlyServerURL"] == ""
