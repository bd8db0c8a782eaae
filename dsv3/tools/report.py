"""Report a study (or one run): arms side by side, paired differences with intervals, a plain verdict."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsv3.cli import REQUIRED, option

FIRST = "folder"  # may be given without its name


@dataclass
class Options:
    folder: str = option(REQUIRED, "a folder with the runs of a study, such as runs/table4_mtp; or one run")
    out: str | None = option(None, "the folder to write report.html, report.md and their pictures to; null: the same")


def run(options: Options) -> dict[str, Any]:
    """Write the report and print its verdict.

    Raises:
        FileNotFoundError: the folder holds no finished run of a study.
    """
    from dsv3.study.report import sections, write_study_report
    from dsv3.study.results import read_study
    from dsv3.watch.page import write_run_report

    folder = Path(options.folder)
    if (folder / "config.yaml").exists():
        written = str(write_run_report(folder))
        print(f"written to {written}")
        return {"html": written}
    study = read_study(folder)
    paths = write_study_report(study, Path(options.out) if options.out else folder)
    found: list[dict[str, Any]] = [
        {"title": s.title, "sentences": s.sentences, "rows": [dict(zip(s.headers, row, strict=True)) for row in s.rows]}
        for s in sections(study)
    ]
    print("\n".join([*found[0]["sentences"], f"written to {paths['html']} and {paths['md']}"]))
    return {"study": study.name, "sections": found, **paths}
