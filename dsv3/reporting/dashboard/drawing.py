"""Contents of the page: a skeleton for each view; its plots and parts are drawn when what they show has changed."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import plotly.graph_objects as go

from dsv3.reporting.dashboard.address import Choice
from dsv3.reporting.dashboard.watched import Watched, stamp
from dsv3.reporting.history import History
from dsv3.reporting.style import empty

log = logging.getLogger(__name__)


class Scene(NamedTuple):
    """What is drawn: a run, those picked in the table, all of the run's study, and the choices of the controls."""

    run: History
    picked: Sequence[History]
    study: Sequence[History]
    choice: Choice


class Drawn(NamedTuple):
    """A plot (`make` returns a figure) or another part of a view, and the choices that it depends on.

    Among them `picked` or `study`: then it depends on the picked runs, or on those of the study, not on the one run.
    """

    make: Callable[[Scene], Any]
    uses: tuple[str, ...] = ()


class View(NamedTuple):
    """`skeleton(run)`: the elements, of which each plot and each part has its name in `drawn`. `first(run)`: plots that
    a large screen begins with."""

    skeleton: Callable[[str], Any]
    drawn: Mapping[str, Drawn]
    first: Callable[[History], tuple[str, ...]]


def scene_of(watched: Watched, run: str, choice: Choice) -> Scene | None:
    """None where the run is not there any more."""
    found = watched.look()
    names = dict.fromkeys([*choice.pinned, *choice.picked])
    if run not in found:
        return None
    return Scene(found[run], [found[name] for name in names if name in found], watched.study(found[run]), choice)


def key(scene: Scene, part: Drawn, stamps: Mapping[str, str]) -> str:
    """Differs once the part would be drawn differently; its first word once it would show something else: other runs,
    or these by other choices."""
    runs = scene.picked if "picked" in part.uses else scene.study if "study" in part.uses else [scene.run]
    choices = [getattr(scene.choice, name) for name in part.uses if name != "study"]
    of_what = json.dumps([[run.name for run in runs], choices])
    return f"{hash(of_what):x} {hash(tuple(stamps[run.name] for run in runs)):x}"


def redrawn(
    watched: Watched, scene: Scene, parts: Mapping[str, Drawn], names: Sequence[str], known: Mapping[str, str]
) -> tuple[dict[str, Any], dict[str, str]]:
    """What has changed of the named parts since they had the known keys, and all keys now."""
    stamps = {run.name: stamp(run) for run in {scene.run, *scene.picked, *scene.study}}
    now = {name: key(scene, parts[name], stamps) for name in names}
    changed = {}
    for name in names:
        if known.get(name) != now[name]:
            with watched.lock:
                changed[name] = made(parts[name], scene, name)
    return changed, now


def made(part: Drawn, scene: Scene, name: str) -> Any:
    """A part; a line about what is wrong where its tables cannot be read, so that the others are shown."""
    try:
        return part.make(scene)
    except Exception as error:  # a run folder may hold anything
        log.warning("%s of %s: %s", name, scene.run.name, error)
        if not scene.run.folder.path.is_dir():
            return empty(name, f"the folder of {scene.run.name} is gone")
        what = str(error).replace(f"{scene.run.folder.path}/", "")
        return empty(name, f"cannot be drawn: {what[:200]}")


def text_of(content: Any) -> Any:
    """A part that is no plot; of a plot that stands for a failed one, its text."""
    return content.layout.annotations[0].text if isinstance(content, go.Figure) else content
