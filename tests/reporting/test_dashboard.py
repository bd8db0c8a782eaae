"""The live dashboard and the report of a run, driven in a browser as a researcher would."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3.reporting import experts
from dsv3.reporting.dashboard.application import build_app
from dsv3.reporting.history import History, find_runs
from dsv3.reporting.page import write_run_report
from tests.reporting.browser import Tab, launched, opened, served
from tests.reporting.made_up import MadeUpRun

PLOT = "document.getElementById('{\"plot\":\"%s\"}')?.querySelector('.js-plotly-plot')"
"""Dash writes an id with sorted keys and no spaces; the plot is inside."""


def data_of(tab: Tab, picture: str, what: str) -> Any:
    wait_for(tab, picture, "true")
    return tab.page.evaluate(f"(() => {{ const plot = {PLOT % picture}; return {what}; }})()")


def wait_for(tab: Tab, picture: str, condition: str) -> None:
    drawn = "plot && plot._fullData && plot._fullData.length"
    tab.page.wait_for_function(f"(() => {{ const plot = {PLOT % picture}; return {drawn} && {condition}; }})()")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with launched(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def made_up(tmp_path: Path) -> MadeUpRun:
    run = MadeUpRun(tmp_path / "runs" / "study" / "seed1", layers=4, experts=32)
    for _ in range(3):
        run.interval()
    return run


def test_page_loads_slides_and_follows_a_running_job(made_up: MadeUpRun, browser: Any, tmp_path: Path) -> None:
    made_up.find("layers.2", "dead expert", 7, "layers.2 expert 7 is dead: 0.00% of an even share")
    run = History(made_up.path, "x")
    times = experts.moments(run.table("metrics/routing"))
    with served(build_app(tmp_path / "runs")) as url, opened(browser) as tab:
        tab.page.goto(url)
        wait_for(tab, "load", "plot._fullData.length == 1")
        size = data_of(tab, "load", "[plot._fullData[0].z.length, plot._fullData[0].z[0].length]")
        assert size == [4, 32], "layers x experts"
        shown = data_of(tab, "load", "plot._fullData[0].z.map(row => Array.from(row))")
        assert np.allclose(shown, experts.load_at(run.table("metrics/routing"), times[-1]))
        slide(tab, "ArrowLeft")
        wait_for(tab, "load", f"plot.layout.title.text.includes('{times[-2]:,}')")
        moved = data_of(tab, "load", "plot._fullData[0].z.map(row => Array.from(row))")
        assert np.allclose(moved, experts.load_at(run.table("metrics/routing"), times[-2]))
        assert not np.allclose(moved, shown)
        slide(tab, "ArrowRight")
        wait_for(tab, "load", f"plot.layout.title.text.includes('{times[-1]:,}')")
        points = data_of(tab, "loss", "plot._fullData[0].y.length")
        assert points == made_up.steps
        made_up.interval()
        wait_for(tab, "loss", f"plot._fullData[0].y.length == {made_up.steps}")
        wait_for(tab, "load", f"plot.layout.title.text.includes('{made_up.tokens:,}')")
        assert data_of(tab, "benchmarks", "plot._fullData[0].y.length") == 2
        assert data_of(tab, "formats", "plot._fullData.length") == 4, "two roles, two figures"
        tab.page.wait_for_selector("text=layers.2 expert 7 is dead")
        assert_readable(tab)
        tab.page.set_viewport_size({"width": 390, "height": 844})
        tab.page.wait_for_timeout(500)
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390, "nothing sticks out on a phone"
        assert tab.wrong == []


def test_the_slider_follows_from_the_first_interval_on(browser: Any, tmp_path: Path) -> None:
    run = MadeUpRun(tmp_path / "runs" / "seed1", layers=2, experts=8)
    run.interval()
    with served(build_app(tmp_path / "runs")) as url, opened(browser) as tab:
        tab.page.goto(url)
        wait_for(tab, "load", f"plot.layout.title.text.includes('{run.tokens:,}')")
        for _ in range(2):
            run.interval()
            wait_for(tab, "load", f"plot.layout.title.text.includes('{run.tokens:,}')")
        assert tab.wrong == []


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


def slide(tab: Tab, key: str) -> None:
    tab.page.locator("#moment [role=slider]").focus()
    tab.page.keyboard.press(key)


def assert_readable(tab: Tab) -> None:
    """Every picture has a title, and every visible axis a label."""
    tab.page.wait_for_function("[...document.querySelectorAll('.js-plotly-plot')].every(plot => plot._fullData)")
    unlabelled = tab.page.evaluate(
        """[...document.querySelectorAll('.js-plotly-plot')].filter(plot => plot.data.length && !(
            plot.layout.title.text && (plot.layout.xaxis.title.text || plot.layout.xaxis2)
            && (plot.layout.yaxis.title.text || plot.layout.yaxis.type == 'category'))).length"""
    )
    assert unlabelled == 0


def test_report_is_one_file_that_needs_nothing_else(made_up: MadeUpRun, browser: Any, tmp_path: Path) -> None:
    out = write_run_report(made_up.path)
    with opened(browser, width=390, height=844) as tab:
        tab.page.goto(out.as_uri())
        tab.page.wait_for_selector(".heatmaplayer")
        plots = tab.page.evaluate("document.querySelectorAll('.js-plotly-plot').length")
        assert plots >= 12
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390
        assert tab.wrong == []


def test_256_experts_in_58_layers(browser: Any, tmp_path: Path) -> None:
    """Every layer and expert is there, and the report stays under 20 MB; the seconds to open are printed."""
    run = MadeUpRun(tmp_path / "runs" / "big", layers=58, experts=256, top_k=8)
    for _ in range(10):
        run.interval()
    assert write_run_report(run.path).stat().st_size < 20e6
    with served(build_app(tmp_path / "runs")) as url, opened(browser) as tab:
        started = time.perf_counter()
        tab.page.goto(url)
        wait_for(tab, "load", "plot._fullData.length == 1 && plot._fullData[0].z.length == 58")
        seconds = time.perf_counter() - started
        assert data_of(tab, "load", "plot._fullData[0].z[0].length") == 256
        print(f"opened in {seconds:.2f} s")
        assert tab.wrong == []


def test_runs_are_found_and_read_as_they_grow(made_up: MadeUpRun, tmp_path: Path) -> None:
    (tmp_path / "runs" / "study" / "seed1.old-1").mkdir()
    (tmp_path / "runs" / "study" / "seed1.old-1" / "config.yaml").write_text("{}")
    (run,) = find_runs(tmp_path / "runs")
    assert (run.name, run.state, run.tokens) == ("study/seed1", "training", made_up.tokens)
    before = run.table("metrics/train")
    assert run.table("metrics/train") is before, "nothing new: nothing is read"
    made_up.interval()
    assert len(run.table("metrics/train")) == made_up.steps
    made_up.folder.drop_after(made_up.tokens - 1)
    assert run.table("metrics/train").equals(before), "back at the checkpoint before"
    made_up.folder.write_summary({})
    assert run.state == "finished"
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_runs(tmp_path / "nowhere")


def test_empty_run_is_shown_as_one(browser: Any, tmp_path: Path) -> None:
    """A run that has just begun has a config and nothing else."""
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "config.yaml").write_text("{}")
    with served(build_app(tmp_path)) as url, opened(browser) as tab:
        tab.page.goto(url)
        tab.page.wait_for_selector("text=no training steps logged yet")
        assert tab.wrong == []
    with pytest.raises(FileNotFoundError, match="no metrics/train"):
        write_run_report(tmp_path / "begun")
