"""An episode of an agent as a page of its own, and as a GIF."""

from pathlib import Path
from typing import Any

from dsv3.checkpoint.run_folder import write_atomically
from dsv3.reporting.episodes import episode_parts, frames_of, gif_of
from dsv3.reporting.page import page


def write_episode(folder: Path, task: str, result: dict[str, Any]) -> tuple[Path, Path]:
    """Write the page and the GIF of an episode; their paths."""
    frames = frames_of(result)
    stem = f"{task}-{result['seed']}"
    html = page("Episode", episode_parts(task, result, frames))
    paths = folder / f"{stem}.html", folder / f"{stem}.gif"
    for path, content in zip(paths, (html.encode(), gif_of(frames)), strict=True):
        write_atomically(path, lambda temporary, content=content: temporary.write_bytes(content))
    return paths
