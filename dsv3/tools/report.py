"""Report a study, any runs or one run: what each arm is, the verdict, figures with intervals, plots."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3.cli import REQUIRED, option

if TYPE_CHECKING:
    from dsv3.reporting.study_results import Study
    from dsv3.study.scaling_results import Grid

log = logging.getLogger(__name__)

FIRST = "folder"  # may be given without its name


@dataclass
class Options:
    folder: str = option(REQUIRED, "a folder with runs, such as runs/table4_mtp; or one run")
    where: str | None = option(
        None, "only runs for which this holds, such as 'balancing=loss_free, seed<3, bpb<2.1'; null: all"
    )
    baseline: str | None = option(None, "the arm that the others are compared with; null: the study's, or the first")
    metric: str | None = option(None, "metric of the verdict; null: the study's, or bits per byte at equal tokens")
    out: str | None = option(None, "the folder to write report.html, report.md and plots to; null: the same")
    predict: str | None = option(None, "of a scaling law: a run folder whose loss to predict, by its run_info.json")


def run(options: Options) -> dict[str, Any]:
    """Write the report and print its verdict.

    Raises:
        FileNotFoundError: the folder holds no finished run.
        ValueError: there is no such metric, baseline or run, or a key is for several runs and this is one.
    """
    from dsv3.reporting.page import write_run_report
    from dsv3.reporting.study_results import read_study
    from dsv3.study.scaling_results import is_grid, read_grid

    folder = Path(options.folder)
    if (folder / "config.yaml").exists():
        given = [key for key in ("where", "baseline", "metric", "out", "predict") if getattr(options, key) is not None]
        if given:
            raise ValueError(
                f"{folder} is one run: {' and '.join(given)} {'is' if len(given) == 1 else 'are'} for more"
            )
        written = str(write_run_report(folder))
        print(f"written to {written}")
        return {"html": written}
    out = Path(options.out) if options.out else folder
    if options.where is None and is_grid(folder):
        predict = Path(options.predict) if options.predict else None
        return write_grid(read_grid(folder, predict=predict), out)
    if options.predict:
        raise ValueError(f"predict={options.predict}: {folder} is no scaling law (study.grid)")
    study = read_study(folder, where=options.where, baseline=options.baseline)
    if options.metric:
        study = study._replace(metric=options.metric)
    return write_study(study, out)


def report_of_ended(folder: Path, current: Mapping[str, Any] | None = None) -> None:
    """The report of a study all of whose runs have ended; a warning where none of them is finished.

    current: the study's settings as they are now, if not as its runs have recorded them.
    """
    from dsv3.reporting.study_results import read_study
    from dsv3.study.scaling_results import is_grid, read_grid

    try:
        if is_grid(folder):
            write_grid(read_grid(folder, current=current), folder)
        else:
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
    verdict = next(section.sentences for section in content if section.title == "Verdict")
    print("\n".join([*(sentence.strip("*") for sentence in verdict), f"written to {paths['html']} and {paths['md']}"]))
    return {"study": study.name, "sections": found, **paths}


def write_grid(grid: "Grid", folder: Path) -> dict[str, Any]:
    """Write the report of a scaling law into `folder` and print what it says."""
    from dsv3.study.scaling_report import sentences, write_scaling_report
    from dsv3.study.scaling_results import as_json

    paths = write_scaling_report(grid, folder)
    print("\n".join([*sentences(grid), f"written to {paths['html']} and {paths['md']}"]))
    return as_json(grid) | paths
