"""Pictures of the README, taken in Chromium from runs of one's own: `python -m docs.hooks.pictures RUNS STUDY`.

dashboard.png       the first screen of the dashboard on the folder RUNS
study_report.png    the beginning of the report in the folder STUDY
"""

import sys
import tempfile
from pathlib import Path

from dsv3.paths import ROOT
from dsv3.reporting.dashboard.application import build_app
from tests.reporting.browser import launched, opened, served

PATIENCE = 120
"""Seconds until the plots must be there."""
IMAGES = ROOT / "docs" / "images"


def take(runs: Path, study: Path) -> None:
    report = (study / "report.html").resolve().as_uri()
    with tempfile.TemporaryDirectory() as profile, launched(Path(profile)) as browser:
        with served(build_app(runs)) as url, opened(browser, width=1400, height=900) as tab:
            tab.page.goto(url)
            tab.until("document.querySelectorAll('.heatmaplayer image, .scatterlayer .js-line').length >= 6", PATIENCE)
            tab.until("document.querySelector('#content h2 + div table, #content p')", PATIENCE)
            tab.until("!document.querySelector('.dash-graph--pending')", PATIENCE)
            tab.page.wait_for_timeout(1000)  # plots fade in
            tab.page.screenshot(path=IMAGES / "dashboard.png")
        with opened(browser, width=1240, height=1180) as tab:
            tab.page.goto(report)
            tab.until("document.querySelectorAll('.scatterlayer .js-line').length >= 4", PATIENCE)
            tab.page.screenshot(path=IMAGES / "study_report.png")


if __name__ == "__main__":
    take(*map(Path, sys.argv[1:3]))
