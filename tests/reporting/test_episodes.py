"""Episodes as pages and GIFs: replayed states, the model's words escaped, likelihoods and experts of every step."""

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dsv3.environments import EVALUATION_SEEDS, opened
from dsv3.evaluation.agents.play import play
from dsv3.evaluation.agents.shown import won_and_lost
from dsv3.reporting.episode_page import write_episode
from dsv3.reporting.episodes import episode_parts, frames_of, read_episodes
from dsv3.tools import agents
from tests.evaluation.agents.test_play import Scripted, games


@pytest.fixture(scope="module")
def by_text() -> dict[str, Any]:
    (result,) = play(games(1), Scripted("<b>turn</b> left & right", "turn left"))
    return json.loads(json.dumps(result))


def test_frames_are_the_states_that_the_actions_led_to(by_text: dict[str, Any]) -> None:
    frames = frames_of(by_text)
    episode = opened("babyai/goto", seed=EVALUATION_SEEDS, steps=6)
    assert len(frames) == 7
    for step, frame in zip(by_text["trajectory"], frames, strict=False):
        assert np.array_equal(frame, episode.frame())
        episode.step(step["action"])


def test_a_page_shows_every_step_and_escapes_what_the_model_wrote(by_text: dict[str, Any], tmp_path: Path) -> None:
    page, gif = write_episode(tmp_path, "babyai_goto", by_text)
    html = page.read_text()
    assert "<b>turn</b>" not in html
    assert "&lt;b&gt;turn&lt;/b&gt; left &amp; right" in html
    assert len(re.findall(r'alt="step [0-9]+"', html)) == by_text["steps"]
    assert "no action: nothing was done" in html
    assert len(html) < 500_000
    assert Image.open(gif).n_frames >= 2
    inside = re.search(r"data:image/gif;base64,([A-Za-z0-9+/=]+)", html)
    assert inside is not None
    assert base64.b64decode(inside[1]) == gif.read_bytes()
    assert Image.open(io.BytesIO(gif.read_bytes())).format == "GIF"


def test_likelihoods_and_experts_are_tables_of_a_step() -> None:
    (result,) = play(games(1, actions="likelihood"), Scripted())
    result["trajectory"][0]["experts"] = {"layers.1": [(3, 0.25), (7, 0.125)]}
    html = "".join(episode_parts("babyai_goto", result, frames_of(result)))
    assert html.count("probability among them") == result["steps"]
    assert "3 (25%), 7 (12%)" in html


def test_the_best_and_the_worst_are_kept() -> None:
    results = [{"progress": p, "seed": i} for i, p in enumerate([0.5, 1.0, 0.0, 1.0, 0.0])]
    assert [one["seed"] for one in won_and_lost(results)] == [1, 2]
    assert [one["seed"] for one in won_and_lost(results[1:2])] == [1]


def test_the_tool_draws_what_was_kept(by_text: dict[str, Any], tmp_path: Path) -> None:
    for folder in ("episodes", "benchmarks/newest-live/episodes"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "babyai_goto.json").write_text(json.dumps([by_text]))
    assert len(list(read_episodes(tmp_path))) == 2
    written = agents.run(agents.Options(folder=str(tmp_path), out=str(tmp_path / "pages")))
    assert all(Path(paths["gif"]).exists() for paths in written.values())
    with pytest.raises(FileNotFoundError, match=r"no episodes; evaluate\.py with tasks=\[babyai\]"):
        agents.run(agents.Options(folder=str(tmp_path / "pages")))
