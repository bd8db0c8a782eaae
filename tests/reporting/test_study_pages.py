"""Pages of a study: its report, and its view on the dashboard while it goes on."""

import json
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from dsv3.checkpoint.holding import hold
from dsv3.reporting.dashboard.application import build_app
from dsv3.reporting.history import find_runs
from dsv3.reporting.page import write_run_report
from dsv3.reporting.study_progress import Job, jobs_of, seconds_left, study_folder
from dsv3.reporting.study_results import read_study
from dsv3.study.report import MOST_BYTES, PLOTLY, packed, pages, sections
from dsv3.study.section import Section
from dsv3.tools.report import write_study
from tests.reporting.browser import POISON, opened, served
from tests.reporting.made_up import MadeUpRun
from tests.reporting.test_study_results import made

FOLDER = POISON.replace("/", "")
"""A name that a folder can have."""


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study whose names, texts and settings are a stranger's."""
    root = tmp_path_factory.mktemp("runs")
    arms = {"a": [], FOLDER: [POISON]}
    for arm, bpb in (("a", 2.0), (FOLDER, 1.5)):
        for seed in (1, 2):
            made(root, arm, seed, bpb=bpb + seed / 100, arms=arms, settings={"x": {FOLDER: f"{POISON}{bpb}"}})
    made(root, "a", 3, finished=False, arms=arms)
    (root / "a" / "seed3" / "failure.txt").write_text(POISON)
    for path in root.rglob("config.yaml"):
        config = OmegaConf.load(path)
        config.study.question = config.study.finding = config.run.experiment = POISON
        OmegaConf.save(config, path)
    for path in root.rglob("summary.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"git_commit": POISON, "versions": {POISON: POISON}}))
    return root


def test_pages_of_a_study_say_first_what_each_arm_is_and_run_no_foreign_script(poisoned: Path, browser: Any) -> None:
    written = write_study(read_study(poisoned), poisoned)
    names = {path.name for path in poisoned.glob("report*.html")}
    assert names == {"report.html", "report_all_figures.html", "report_experts.html", "report_runs.html"}
    assert all((poisoned / name).stat().st_size < MOST_BYTES for name in names)
    with opened(browser, width=390, height=844) as tab:
        tab.page.goto(Path(written["html"]).as_uri())
        tab.until("document.querySelectorAll('.js-plotly-plot .main-svg').length >= 4")
        headings = tab.page.evaluate("[...document.querySelectorAll('h2')].map(h => h.textContent)")
        assert headings[:4] == ["Arms", "Verdict", "Results", "Held-out text"]
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390
        for name in sorted(names - {"report.html"}):
            tab.page.click(f"nav a[href='{name}']")
            tab.page.wait_for_url(f"**/{name}")
            tab.page.wait_for_load_state()
            assert tab.page.evaluate("window.poisoned") is None
            assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390
        assert tab.page.evaluate("document.querySelectorAll('img, body script[src]').length") == 0
        assert tab.wrong == []


def test_a_page_that_would_be_too_large_goes_on_in_another(poisoned: Path) -> None:
    study = read_study(poisoned)
    large = [Section(f"{i}", ["x" * 300_000], page="More") for i in range(10)]
    found = pages(study, [*sections(study), *large])
    assert [name for name in found if "more" in name][:2] == ["report_more.html", "report_more_2.html"]
    assert all(len(html.encode()) < MOST_BYTES for html in found.values())
    assert all(f'href="{name}"' in found["report.html"] for name in found if name != "report.html")
    assert all(f'src="{PLOTLY}"' in html for html in found.values())
    assert sum(len(part) for parts in packed(large) for part in parts) > 3_000_000


class Tags(HTMLParser):
    """What a browser would make of a page: its elements, and the attributes that run scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.update([tag, *(name for name, _ in attrs if name.startswith("on"))])


def test_a_run_report_with_foreign_texts_has_no_foreign_elements(tmp_path: Path) -> None:
    run = MadeUpRun(tmp_path / FOLDER, layers=2, experts=4)
    run.names = [POISON, "mtp.0"]
    run.interval()
    run.find(POISON, POISON, -1, POISON)
    rollout = {"tokens": run.tokens, "prompt": POISON, "answer": POISON, "ended": True, "reward": 1.0}
    run.folder.table("metrics/rollouts").append(rollout)
    run.folder.flush(run.tokens)
    page = Tags()
    page.feed(write_run_report(run.path).read_text())
    assert page.found["script"] > 10, "plotly.js and the plots"
    assert not {"img", "onerror"} & set(page.found)


def test_runs_that_are_planned_wait(tmp_path: Path) -> None:
    for arm, seed in (("a", 1), ("b", 1)):
        made(tmp_path, arm, seed, finished=arm == "a")
    for path in tmp_path.rglob("config.yaml"):
        config = OmegaConf.load(path)
        config.study.seeds = [1, 2]
        OmegaConf.save(config, path)
    runs = find_runs(tmp_path)
    assert {study_folder(run) for run in runs} == {tmp_path}
    hold(tmp_path / "b" / "seed1").close()  # a process of this machine, which is no more
    found = {(job.arm, job.seed): job.state for job in jobs_of(runs)}
    assert found == {("a", 1): "finished", ("b", 1): "stopped", ("a", 2): "waiting", ("b", 2): "waiting"}


def test_time_left_of_a_study() -> None:
    """Two runs train at 10 tokens/s each, 90 and 50 of 100 tokens in; one waits: 10 + 50 + 100 tokens."""
    rows = [{"state": "training", "tokens": n, "planned": 100, "seconds_left": (100 - n) / 10} for n in (90, 50)]
    jobs = [Job("a", seed, "training", row=row) for seed, row in enumerate(rows)]
    assert seconds_left([*jobs, Job("a", 3)]) == pytest.approx(160 / 20)
    assert seconds_left([Job("a", 3)]) is None


@pytest.mark.slow
def test_the_dashboard_shows_a_study_as_it_goes_on(poisoned: Path, browser: Any, tmp_path: Path) -> None:
    made(tmp_path, "alone", 1, arms=None)
    with served(build_app(poisoned)) as url, opened(browser, width=390, height=844) as tab:
        tab.page.goto(f"{url}/?view=study")
        tab.page.wait_for_selector("text=is better than a by 0.5000 bits per byte")
        assert tab.page.evaluate("document.documentElement.scrollWidth") <= 390
        text = tab.page.locator("#content").inner_text()
        for state, count in {"finished": 4, "waiting": 1, "failed": 1}.items():
            assert f"{state}\n{count}\nof 6 runs" in text
        made(poisoned, FOLDER, 3, finished=False, arms={"a": []})
        tab.until("document.querySelector('#content').innerText.includes('waiting\\n0\\nof 6 runs')")
        tab.page.click("text=finished >> nth=1")
        tab.page.wait_for_url("**/?run=*")
        assert tab.page.evaluate("window.poisoned") is None
        assert tab.wrong == []
    with served(build_app(tmp_path)) as url, opened(browser) as tab:
        tab.page.goto(f"{url}/?view=study")
        tab.page.wait_for_selector("text=alone/seed1 belongs to no study")
        assert tab.wrong == []
