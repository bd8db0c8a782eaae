"""Report a study, any runs or one run: what each arm is, the verdict, figures with intervals, plots."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dsv3.cli import REQUIRED, option

if TYPE_CHECKING:
    from dsv3.reporting.study_results import Study

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


def run(options: Options) -> dict[str, Any]:
    """Write the report and print its verdict.

    Raises:
        FileNotFoundError: the folder holds no finished run.
        ValueError: there is no such metric, baseline or run, or a key is for several runs and this is one.
    """
    from dsv3.reporting.page import write_run_report
    from dsv3.reporting.study_results import read_study

    folder = Path(options.folder)
    if (folder / "config.yaml").exists():
        given = [key for key in ("where", "baseline", "metric", "out") if getattr(options, key) is not None]
        if given:
            raise ValueError(
                f"{folder} is one run: {' and '.join(given)} {'is' if len(given) == 1 else 'are'} for more"
            )
        written = str(write_run_report(folder))
        print(f"written to {written}")
        return {"html": written}
    study = read_study(folder, where=options.where, baseline=options.baseline)
    if options.metric:
        study = study._replace(metric=options.metric)
    return write_study(study, Path(options.out) if options.out else folder)


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
