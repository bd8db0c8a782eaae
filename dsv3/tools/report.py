"""Report a study (or one run): arms side by side, paired differences with intervals, verdicts."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3.cli import REQUIRED, option

if TYPE_CHECKING:
    from dsv3.reporting.study_results import Study

log = logging.getLogger(__name__)

FIRST = "folder"  # may be given without its name


@dataclass
class Options:
    folder: str = option(REQUIRED, "a folder with the runs of a study, such as runs/table4_mtp; or one run")
    out: str | None = option(None, "the folder to write a study's report.html, report.md and plots to; null: the same")
    metric: str | None = option(None, "of a study: metric of the verdict; null: `study.metric` of its runs")


def run(options: Options) -> dict[str, Any]:
    """Write the report and print its verdict.

    Raises:
        FileNotFoundError: the folder holds no finished run of a study.
        ValueError: there is no such metric, or a key is for studies and this is one run.
    """
    from dsv3.reporting.page import write_run_report
    from dsv3.reporting.study_results import read_study

    folder = Path(options.folder)
    if (folder / "config.yaml").exists():
        if options.out or options.metric:
            raise ValueError(f"{folder} is one run: out and metric are for studies")
        written = str(write_run_report(folder))
        print(f"written to {written}")
        return {"html": written}
    study = read_study(folder)
    if options.metric:
        study = study._replace(metric=options.metric)
    return write_study(study, Path(options.out) if options.out else folder)


def report_of_ended(folder: Path, current: Mapping[str, Any] | None = None) -> None:
    """The report of a study all of whose runs have ended; a warning where none of them is finished.

    current: the study's settings as they are now, if not as its runs have recorded them.
    """
    from dsv3.reporting.study_results import read_study

    try:
        write_study(read_study(folder, current), folder)
    except (FileNotFoundError, ValueError) as error:  # no run finished, or `run.dir` sent them elsewhere
        log.warning("No report of the study: %s", error)


def write_study(study: "Study", folder: Path) -> dict[str, Any]:
    """Write a study's report into `folder` and print its verdict.

    Raises:
        ValueError: there is no such metric.
    """
    from dsv3.study.report import sections, write_study_report

    content = list(sections(study))
    found: list[dict[str, Any]] = [
        {"title": s.title, "sentences": s.sentences, "rows": [dict(zip(s.headers, row, strict=True)) for row in s.rows]}
        for s in content
    ]
    paths = write_study_report(study, content, folder)
    print("\n".join([*found[0]["sentences"], f"written to {paths['html']} and {paths['md']}"]))
    return {"study": study.name, "sections": found, **paths}
