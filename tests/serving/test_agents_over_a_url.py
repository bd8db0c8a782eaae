"""Agents of a model behind our own server play as the model does in process."""

import pytest

from dsv3.evaluation.agents.player import ModelPlayer
from dsv3.evaluation.benchmarks.remote import RemoteAdapter
from dsv3.evaluation.benchmarks.tasks import UnavailableError
from tests.serving.running import Running

SHORT = {"babyai/goto": ("left", "go on"), "crafter": ("do", "sleep")}
"""Short actions: the tiny model's context holds no prompt of the environments."""


@pytest.fixture
def remote(server: Running, monkeypatch: pytest.MonkeyPatch) -> RemoteAdapter:
    monkeypatch.setenv("OPENAI_API_KEY", server.keys["ada"])
    return RemoteAdapter(f"{server.url}/v1", served_model=server.model, at_once=4, seed=1, chat=False)


@pytest.fixture
def own(server: Running) -> ModelPlayer:
    return ModelPlayer(server.scored(), at_once=4)


def test_likelihoods_of_actions_by_echo_and_logprobs(remote: RemoteAdapter, own: ModelPlayer) -> None:
    prompts, actions = [f"You see: a {name} 2 ahead.\nAction:" for name in SHORT], list(SHORT.values())
    for found, expected in zip(remote.action_scores(prompts, actions), own.action_scores(prompts, actions)):
        assert found == pytest.approx(expected, abs=1e-3)


def test_free_text_and_a_key(remote: RemoteAdapter, own: ModelPlayer, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, seeds = [f"You see: a {name} 2 ahead.\nAction:" for name in SHORT], [1, 2]
    assert remote.replies(prompts, seeds, 0.0) == own.replies(prompts, seeds, 0.0)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UnavailableError, match="401"):
        remote.replies(prompts, seeds, 0.0)
