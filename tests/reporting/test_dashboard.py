"""The dashboard and the report of a run, driven in a browser as a researcher would."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsv3.reporting import experts
from dsv3.reporting.dashboard.application import build_app
from dsv3.reporting.history import History
from dsv3.reporting.page import write_run_report
from tests.reporting.browser import POISON, Tab, opened, served
from tests.reporting.made_up import MadeUpRun

PLOT = "[...document.querySelectorAll('.js-plotly-plot')].find(p => p.closest('[id]').id.includes('\"plot\":\"%s\"'))"
"""Dash writes an id with sorted keys and no spaces; the plot is inside."""


PLACE = "[...document.querySelectorAll('.place')].find(p => p.id.includes('\"place\":\"%s\"'))"
"""Where it is drawn once it is on the screen."""


def data_of(tab: Tab, picture: str, what: str) -> Any:
    wait_for(tab, picture, "true")
    return tab.page.evaluate(f"(() => {{ const plot = {PLOT % picture}; return {what}; }})()")


def wait_for(tab: Tab, picture: str, condition: str) -> None:
    """Scroll to a plot, and wait until it is drawn as it should be."""
    there = f"{PLACE % picture}?.scrollIntoView({{block: 'nearest'}})"
    drawn = "plot && plot._fullData && plot._fullData.length"
    tab.until(f"(() => {{ {there}; const plot = {PLOT % picture}; return {drawn} && {condition}; }})()")


def trained(path: Path, intervals: int = 8, **keys: Any) -> MadeUpRun:
    run = MadeUpRun(path, layers=4, experts=16, **keys)
    for _ in range(intervals):
        run.interval(20)
    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two seeds of one arm, one of another, and a sick run."""
    root = tmp_path_factory.mktemp("runs")
    for seed in (1, 2):
        trained(root / "wide" / f"seed{seed}", seed=seed, settings={"router": {"top_k": 8}})
    trained(root / "narrow" / "seed1", settings={"router": {"top_k": 2}})
    trained(root / "sick" / "seed1", sick_from=81, settings={"router": {"top_k": 8}})
    return root


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    with served(build_app(folder)) as url:
        yield url


def text_of(tab: Tab, part: str, awaited: str) -> str:
    """The text of a part of the page, once it holds the awaited words."""
    place = tab.page.locator(f'[id*=\'"part":"{part}"\']')
    place.filter(has_text=awaited).wait_for()
    return str(place.inner_text())


@pytest.mark.slow
def test_ten_questions_about_a_sick_run(url: str, browser: Any) -> None:
    """A new user's questions, each answered on the first screen or by one or two clicks from it."""
    with opened(browser, width=1600, height=1000) as tab:
        tab.page.goto(f"{url}/?run=sick/seed1")
        verdict = text_of(tab, "headline", "not well")  # is it healthy? no click
        assert "layers.2: 14 of 16 experts dead since 328k tokens" in verdict  # which layer, since when? no click
        assert "655k of 2.6M tokens" in verdict  # what is left, when does it end? no click
        assert "left, ends " in verdict
        unwell = text_of(tab, "unwell", "dead")  # which experts, on which domains? no click: the worst layer is shown
        assert "layers.2" in unwell
        assert "2\tdead\t327,680\tall\t0.00" in unwell
        assert data_of(tab, "map", "plot.layout.title.text") == "Load of each expert, layers.2"
        dead = data_of(tab, "map", "[plot._fullData[0].z[2][0], plot._fullData[0].z[2][7]]")
        assert dead[0] > 0.1  # the load over tokens: no click
        assert dead[1] == 0
        findings = text_of(tab, "findings", "slow-down")  # is it slow, did it spike, is a domain gone? no click
        assert "open\tslow-down" in findings
        assert "event\tloss spike" in findings
        assert "open\tstarved domain\t\tprose has under a tenth" in findings
        assert "33% of the usual" in text_of(tab, "tiles", "tokens/s")
        tab.page.click("a:text-is('layers.1')")  # what is wrong with another layer? one click
        unwell = text_of(tab, "unwell", "layers.1")
        assert "5\tdead\t327,680\tcode\t0.00" in unwell
        assert "6\tdead\t327,680\tcode\t0.00" in unwell
        choose(tab, "domain", "code")  # how did a domain's load change? two clicks
        wait_for(tab, "map", "plot.layout.title.text == 'Load of each expert, layers.1, code'")
        assert data_of(tab, "map", "plot._fullData[0].z[5][7]") == 0
        assert tab.page.url.endswith("?run=sick%2Fseed1&layer=layers.1&domain=code")
        choose(tab, "run", "wide/seed1")  # is another run well? two clicks
        assert "All 64 experts in 4 layers get tokens" in text_of(tab, "headline", "wide/seed1")
        assert "sick" not in tab.page.locator("#content").inner_text(), "nothing of another run"
        assert tab.wrong == []


def choose(tab: Tab, picker: str, option: str) -> None:
    tab.page.click(f"#{picker}")
    tab.page.get_by_role("option", name=option, exact=True).click()


def test_every_view_fits_a_phone_in_dark_and_has_titles_and_units(url: str, browser: Any) -> None:
    with opened(browser, width=390, height=844) as tab:
        tab.page.goto(f"{url}/?run=sick/seed1")
        for key, picture in (("1", "vitals"), ("2", "formats"), ("3", "output_norms")):
            tab.page.keyboard.press(key)
            wait_for(tab, picture, "true")
            assert_readable(tab)
            assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390, f"view {key} sticks out on a phone"
        before = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
        tab.page.keyboard.press("t")
        assert tab.page.evaluate("getComputedStyle(document.body).backgroundColor") != before
        tab.page.reload()
        assert tab.page.evaluate("getComputedStyle(document.body).backgroundColor") != before, "the theme is kept"
        assert tab.wrong == []


def test_only_plots_on_the_screen_are_drawn_also_of_another_run(url: str, browser: Any) -> None:
    with opened(browser, width=390, height=844) as tab:
        tab.page.goto(f"{url}/?run=sick/seed1&view=training")
        wait_for(tab, "loss", "plot._fullData[0].y.length == 160")
        formats = f"Boolean({PLOT % 'formats'})"
        assert not tab.page.evaluate(formats)
        wait_for(tab, "formats", "true")  # scrolls there
        choose_run(tab, "narrow/seed1")
        tab.until("document.querySelector('h1').textContent == 'narrow/seed1'")
        tab.until(formats)
        assert not tab.page.evaluate(f"Boolean({PLOT % 'loss'})")
        assert tab.wrong == []


def test_a_table_of_many_runs_fills_while_it_is_shown(
    folder: Path, browser: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here no answer may take time to read a run; a thread reads them when nothing is asked."""
    monkeypatch.setattr("dsv3.reporting.dashboard.answers_to_page.MOST_SECONDS", -1.0)
    with served(build_app(folder)) as url, opened(browser) as tab:
        tab.page.goto(f"{url}/?view=runs&group=router.top_k")
        tab.page.wait_for_selector("#reading:has-text('of 4.')")
        tab.until("document.querySelectorAll('.ag-pinned-left-cols-container .ag-row').length == 4")
        tab.until("document.querySelector('#reading').textContent == ''")
        tab.page.wait_for_selector(".ag-header-cell-text:has-text('router.top_k')")
        tab.page.wait_for_selector("#metrics:has-text('2 selected')")  # no choice is forgotten meanwhile
        tab.page.wait_for_selector("#group:has-text('router.top_k')")
        assert tab.wrong == []
    with served(build_app(folder)) as url, opened(browser) as tab:
        tab.page.goto(f"{url}/?view=runs&picked=sick%2Fseed1&picked=wide%2Fseed1")
        wait_for(tab, "curves", "plot._fullData.length == 6")  # what the address picks is waited for
        assert tab.page.locator(".ag-pinned-left-cols-container .ag-row-selected").count() == 2


def choose_run(tab: Tab, run: str) -> None:
    tab.page.evaluate(f"dash_clientside.set_props('run', {{value: '{run}'}})")


def assert_readable(tab: Tab) -> None:
    """Every picture has a title, and every visible axis a label."""
    tab.until("[...document.querySelectorAll('.js-plotly-plot')].every(plot => plot._fullData)")
    unlabelled = tab.page.evaluate(
        """[...document.querySelectorAll('.js-plotly-plot')].filter(plot => plot.data.length && !(
            plot.layout.title.text && (plot.layout.xaxis.title?.text || plot.layout.xaxis2)
            && (plot.layout.yaxis.title?.text || plot.layout.yaxis.type == 'category'))).length"""
    )
    assert unlabelled == 0


SELECT_ALL_AS_ROWS_COME = """(() => {
    const rows = [];
    dash_ag_grid.getApi('grid').forEachNode(node => rows.push({...node.data}));
    dash_clientside.set_props('grid', {rowData: rows});
    document.querySelector('.ag-header-select-all input').click();
})()"""


def test_runs_are_filtered_picked_grouped_and_saved_and_the_address_keeps_it(
    url: str, browser: Any, tmp_path: Path
) -> None:
    with opened(browser, width=1600, height=1000) as tab:
        tab.page.goto(f"{url}/?view=runs")
        tab.page.wait_for_selector(".ag-row >> nth=3")
        heads = tab.page.locator(".ag-header-cell-text").all_inner_texts()
        assert "router.top_k" in heads
        assert "run.experiment" not in heads, "all runs have the same"
        tab.page.evaluate(SELECT_ALL_AS_ROWS_COME)
        wait_for(tab, "curves", "plot._fullData.filter(t => t.showlegend).length == 4")
        tab.page.locator(".ag-header-select-all input").first.click()
        tab.until("!location.search.includes('picked')")
        tab.page.locator(".ag-header-cell-text", has_text="router.top_k").click()
        first = tab.page.locator(".ag-pinned-left-cols-container .ag-row[row-index='0'], .ag-row[row-index='0']").first
        first.filter(has_text="narrow").wait_for()
        tab.page.locator("input[aria-label='run Filter Input']").fill("wide")
        tab.until("document.querySelectorAll('.ag-row[row-id]').length <= 4")
        tab.page.locator(".ag-row[row-id='wide/seed1'] input[type=checkbox]").first.check()
        tab.page.locator(".ag-row[row-id='wide/seed2'] input[type=checkbox]").first.check()
        wait_for(tab, "curves", "plot._fullData.filter(t => t.showlegend).length == 2")
        assert "seed\t2\t1" not in text_of(tab, "settings", "seed")
        assert "seed\t1\t2" in text_of(tab, "settings", "seed")
        choose(tab, "group", "router.top_k")
        wait_for(tab, "curves", "plot._fullData.some(t => t.name == 'router.top_k=8 (mean and range of 2)')")
        tab.page.locator("#log input").nth(1).check()
        wait_for(tab, "curves", "plot._fullLayout.yaxis.type == 'log'")
        with tab.page.expect_download() as got:
            tab.page.click("#save-table")
        assert got.value.path().read_text().splitlines()[1].startswith("wide/seed1,")
        with tab.page.expect_download() as got:
            tab.page.click("#save-view")
        rows = got.value.path().read_text().splitlines()
        assert rows[0] == "plot,curve,x,y,value"
        assert sum(row.startswith("Curves,router.top_k=8 (mean and range of 2),") for row in rows) == 160 + 8
        with tab.page.expect_download() as got:
            tab.page.locator(
                "[data-title='Download plot as a PNG'], [data-title='Download plot as a png']"
            ).first.click()
        assert got.value.suggested_filename.endswith(".png")
        assert got.value.path().read_bytes().startswith(b"\x89PNG")
        tab.page.click("#pin")
        tab.page.wait_for_selector(".ag-floating-top .ag-row >> nth=1")
        address = tab.page.url
        choices = ("view=runs", "group=router.top_k", "log=y", "picked=wide%2Fseed2", "pinned=wide%2Fseed1", "filters=")
        for part in (*choices, "sort=setting+router.top_k"):
            assert part in address
        tab.page.wait_for_load_state("networkidle")  # a request under way would count as a failed one
        tab.page.goto("about:blank")
        tab.page.goto(address)
        wait_for(tab, "curves", "plot._fullData.some(t => t.name == 'router.top_k=8 (mean and range of 2)')")
        wait_for(tab, "curves", "plot._fullLayout.yaxis.type == 'log'")
        tab.page.wait_for_selector(".ag-floating-top .ag-row >> nth=1")
        assert tab.page.locator("input[aria-label='run Filter Input']").input_value() == "wide"
        assert tab.page.locator(".ag-row-selected").count() > 0
        assert tab.wrong == []


HOLDING = """
import fcntl, socket, sys, time
lock = open(sys.argv[1], "a+")
fcntl.flock(lock, fcntl.LOCK_EX)
lock.truncate(0); lock.write(socket.gethostname()); lock.flush()
print("held", flush=True)
time.sleep(600)
"""


def test_page_follows_a_running_job_keeps_the_zoom_and_sees_it_killed(browser: Any, tmp_path: Path) -> None:
    run = MadeUpRun(tmp_path / "runs" / "seed1", layers=2, experts=8)
    run.interval()
    holder = subprocess.Popen([sys.executable, "-c", HOLDING, run.path / ".lock"], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with served(build_app(tmp_path / "runs")) as url, opened(browser) as tab:
        tab.page.goto(f"{url}/?view=training")
        wait_for(tab, "loss", "plot._fullData[0].y.length == 12")
        zoomed = drag(tab)
        data_of(tab, "loss", "void Plotly.relayout(plot, {'yaxis.range[0]': 1, 'yaxis.range[1]': 9})")  # a second move
        tab.page.set_viewport_size({"width": 1000, "height": 900})
        for steps in (24, 36, 48):
            run.interval()
            wait_for(tab, "loss", f"plot._fullData[0].y.length == {steps}")
            assert data_of(tab, "loss", "plot._fullLayout.xaxis.range") == zoomed
            assert data_of(tab, "loss", "plot._fullLayout.yaxis.range") == [1, 9]
        tab.page.keyboard.press("3")
        wait_for(tab, "load", f"plot.layout.title.text.includes('{run.tokens:,}')")
        tab.page.locator("#moment [role=slider]").focus()
        tab.page.keyboard.press("ArrowLeft")
        before = run.tokens // 4 * 3
        wait_for(tab, "load", f"plot.layout.title.text.includes('{before:,}')")
        moved = data_of(tab, "load", "plot._fullData[0].z.map(row => Array.from(row))")
        assert np.allclose(moved, experts.load_at(History(run.path, "x").routing(), before)[1])
        tab.page.keyboard.press("1")
        text_of(tab, "headline", "training")
        holder.kill()
        holder.wait()
        text_of(tab, "headline", "stopped")
        assert tab.wrong == []


def test_a_zoom_is_forgotten_once_the_plot_shows_something_else(browser: Any, tmp_path: Path) -> None:
    run = MadeUpRun(tmp_path / "runs" / "seed1", layers=2, experts=8)
    run.interval()
    with served(build_app(tmp_path / "runs")) as url, opened(browser) as tab:
        tab.page.goto(f"{url}/?view=runs&picked=seed1&smooth=0")
        wait_for(tab, "curves", "plot._fullData[0].y.length == 12")
        data_of(tab, "curves", "void Plotly.relayout(plot, {'xaxis.range[0]': 5000, 'xaxis.range[1]': 9000})")
        wait_for(tab, "curves", "plot._fullLayout.xaxis.range[1] == 9000")
        run.interval()
        wait_for(tab, "curves", "plot._fullData[0].y.length == 24")
        assert data_of(tab, "curves", "plot._fullLayout.xaxis.range") == [5000, 9000]
        tab.page.evaluate("() => dash_clientside.set_props('x', {value: 'steps'})")
        wait_for(tab, "curves", "plot._fullLayout.xaxis.range[1] < 5000")
        run.interval()
        wait_for(tab, "curves", "plot._fullData[0].y.length == 36")
        assert data_of(tab, "curves", "plot._fullLayout.xaxis.range[1] < 5000")
        assert tab.wrong == []


def drag(tab: Tab) -> Any:
    """Zoom into the middle of the plot of the loss; returns the range of its x-axis."""
    box = tab.page.locator(".nsewdrag").first.bounding_box()
    y = box["y"] + box["height"] / 2
    tab.page.mouse.move(box["x"] + box["width"] / 4, y)
    tab.page.mouse.down()
    tab.page.mouse.move(box["x"] + box["width"] / 2, y, steps=4)
    tab.page.mouse.up()
    wait_for(tab, "loss", "plot._fullLayout.xaxis.range[0] > 5000")
    return data_of(tab, "loss", "plot._fullLayout.xaxis.range")


def test_a_poisoned_run_folder_runs_no_script(browser: Any, tmp_path: Path) -> None:
    """Names of runs, layers, domains and settings, and texts of alerts, may be a stranger's."""
    run = MadeUpRun(tmp_path / "runs" / "=HYPERLINK(1)<img src=x onerror=window.poisoned=1>", layers=2, experts=8,
                    settings={POISON.replace("/", ""): POISON, "deep": {"a": POISON}})  # fmt: skip
    run.names = [POISON, "mtp.0"]
    run.interval()
    run.find(POISON, POISON, -1, POISON)
    (run.path / "run_info.json").write_text('{"parameters": "' + POISON + '", "tokens": "many"}')
    other = MadeUpRun(tmp_path / "runs" / "other", layers=2, experts=8)
    other.interval()
    (other.path / "metrics" / "routing" / "part-000000000000001.parquet").write_text("no Parquet")
    with served(build_app(tmp_path / "runs")) as url, opened(browser) as tab:
        for view, picture in (("health", "map"), ("training", "loss"), ("experts", "load")):
            tab.page.goto(f"{url}/?view={view}&run==HYPERLINK(1)%3Cimg src=x onerror=window.poisoned=1%3E")
            wait_for(tab, picture, "true")
        tab.page.goto(f"{url}/?view=health&run=other")
        tab.page.wait_for_selector("text=cannot be read as Parquet")
        tab.page.goto(f"{url}/?view={POISON}&run={POISON}&filters=%7B&smooth=nan&moment=1e99&x=__proto__")
        tab.until(f"{PLOT % 'vitals'}?._fullLayout")
        assert tab.page.evaluate("window.poisoned") is None
        # A page that is left drops its requests, which is no error.
        assert [line for line in tab.wrong if not line.startswith("failed: http://127.0.0.1")] == []


def test_a_folder_that_fills_later_is_shown_once_it_does(browser: Any, tmp_path: Path) -> None:
    with served(build_app(tmp_path)) as url, opened(browser) as tab:
        tab.page.goto(url)
        tab.page.wait_for_selector("text=There are no runs in this folder yet.")
        (tmp_path / "begun").mkdir()
        (tmp_path / "begun" / "config.yaml").write_text("{}")
        text_of(tab, "headline", "too early")
        tab.page.keyboard.press("2")
        tab.page.wait_for_selector("text=no training steps logged yet")
        assert tab.wrong == []
    with pytest.raises(FileNotFoundError, match="no metrics/train"):
        write_run_report(tmp_path / "begun")


def test_report_is_one_file_that_needs_nothing_else(folder: Path, browser: Any) -> None:
    out = write_run_report(folder / "wide" / "seed1")
    with opened(browser, width=390, height=844) as tab:
        tab.page.goto(out.as_uri())
        tab.page.wait_for_selector(".heatmaplayer")
        plots = tab.page.evaluate("document.querySelectorAll('.js-plotly-plot').length")
        assert plots >= 12
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390
        assert tab.wrong == []


@pytest.mark.slow
def test_256_experts_in_58_layers(browser: Any, tmp_path: Path) -> None:
    """Every layer and expert is there, and the report stays under 20 MB."""
    run = MadeUpRun(tmp_path / "runs" / "big", layers=58, experts=256, top_k=8)
    for _ in range(10):
        run.interval()
    assert write_run_report(run.path).stat().st_size < 20e6
    with served(build_app(tmp_path / "runs")) as url, opened(browser) as tab:
        tab.page.goto(f"{url}/?view=experts")
        wait_for(tab, "load", "plot._fullData.length == 1 && plot._fullData[0].z.length == 58")
        assert data_of(tab, "load", "plot._fullData[0].z[0].length") == 256
        assert tab.wrong == []
