"""Draw episodes that an agent played: a page and a GIF of the first won and the first lost one of each task."""

from dataclasses import dataclass
from typing import Any

from dsv3.cli import REQUIRED, option

FIRST = "folder"  # may be given without its name


@dataclass
class Options:
    folder: str = option(REQUIRED, "a run folder, or a folder of benchmark results")
    out: str | None = option(None, "folder for the pages; null: episodes/ in the folder")


def run(options: Options) -> dict[str, Any]:
    """Write the pages and print their paths.

    Raises:
        FileNotFoundError: no episode was played there.
    """
    from pathlib import Path

    from dsv3.reporting.episode_page import write_episode
    from dsv3.reporting.episodes import read_episodes, title_of

    folder = Path(options.folder)
    out = Path(options.out) if options.out else folder / "episodes"
    written = {}
    for task, result in read_episodes(folder):
        page, gif = write_episode(out, task, result)
        written[title_of(task, result)] = {"html": str(page), "gif": str(gif)}
        print(f"{title_of(task, result)}: {page}, {gif.name}")
    if not written:
        raise FileNotFoundError(f"{folder}: no episodes; evaluate.py with tasks=[babyai] or tasks=[crafter] plays some")
    return written
