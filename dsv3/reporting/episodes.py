"""Episodes of agents as pages and GIFs: replayed from their seeds and actions, so that no picture is stored."""

import base64
import io
import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dsv3.environments import opened
from dsv3.reporting.tables import table
from dsv3.strict_json import read_json

MOST_STEPS = 64
"""That a page shows; a GIF shows as many, and the last state."""
MILLISECONDS = 400
"""Of each frame of a GIF."""


def read_episodes(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Task and result of every episode that was kept below a run folder or a folder of results."""
    for file in sorted([*folder.glob("episodes/*.json"), *folder.glob("benchmarks/*/episodes/*.json")]):
        for result in read_json(file):
            yield file.stem, result


def frames_of(result: dict[str, Any]) -> list[np.ndarray]:
    """A picture before each of the first steps, and one of the state after the last of them."""
    episode = opened(result["environment"], seed=result["seed"], steps=result["steps"])
    frames = [episode.frame()]
    for step in result["trajectory"][:MOST_STEPS]:
        episode.step(step["action"])
        frames.append(episode.frame())
    return frames


def gif_of(frames: Sequence[np.ndarray]) -> bytes:
    first, *others = [Image.fromarray(frame) for frame in frames]
    out = io.BytesIO()
    first.save(out, "GIF", save_all=True, append_images=others, duration=MILLISECONDS, loop=0)
    return out.getvalue()


def title_of(task: str, result: dict[str, Any]) -> str:
    reached = ", ".join(name.replace("_", " ") for name in result["achieved"]) or "nothing"
    return f"{task}, seed {result['seed']}: progress {result['progress']:.2f} ({reached}) in {result['steps']} steps"


def episode_parts(task: str, result: dict[str, Any], frames: Sequence[np.ndarray]) -> Iterator[str]:
    """The episode as parts of a page: the GIF, the rules, and what was seen and done in every step."""
    rules = opened(result["environment"], seed=result["seed"], steps=1).rules
    yield f"<h2>{escape(title_of(task, result))}</h2>"
    yield f'<p><img alt="{escape(task)}, all steps" src="{_data("gif", gif_of(frames))}"></p>'
    baselines = f"Random actions reach {result['random']:.2f}, the expert {result['expert']:.2f}."
    yield f"<p>{escape(rules)} {baselines} {result['invalid']} invalid replies.</p>"
    yield "<details open><summary>Steps</summary>"
    for number, (step, frame) in enumerate(zip(result["trajectory"], frames), start=1):
        yield _step(number, step, frame)
    if len(result["trajectory"]) > MOST_STEPS:
        yield f"<p>{len(result['trajectory']) - MOST_STEPS} further steps are not shown.</p>"
    yield "</details>"


def _step(number: int, step: dict[str, Any], frame: np.ndarray) -> str:
    picture = io.BytesIO()
    Image.fromarray(frame).save(picture, "PNG", optimize=True)
    said = f"<p>The model wrote: <code>{escape(step['reply'])}</code></p>" if "reply" in step else ""
    done = f"<b>{escape(step['action'])}</b>" if step["action"] else "no action: nothing was done"
    parts = [f"<p>{escape(step['observation'])}</p>{said}<p>{number}. {done}</p>"]
    if "log_likelihoods" in step:
        parts.append(table(["legal action", "log-likelihood", "probability among them"], _likelihoods(step)))
    if step.get("experts"):
        rows = [
            (layer, ", ".join(f"{e} ({share:.0%})" for e, share in used)) for layer, used in step["experts"].items()
        ]
        parts.append(table(["layer", "experts used most (fraction of the prompt's choices)"], rows))
    image = f'<img alt="step {number}" loading="lazy" src="{_data("png", picture.getvalue())}">'
    return f'<div class="grid"><div>{image}</div><div>{"".join(parts)}</div></div>'


def _likelihoods(step: dict[str, Any]) -> list[tuple[str, float, str]]:
    scores = step["log_likelihoods"]
    highest = max(scores.values())
    total = sum(math.exp(score - highest) for score in scores.values())
    ordered = sorted(scores.items(), key=lambda item: -item[1])
    return [(action, score, f"{math.exp(score - highest) / total:.1%}") for action, score in ordered]


def _data(kind: str, content: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"
