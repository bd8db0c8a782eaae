"""Agents as benchmarks: likelihoods of actions, results with baselines, models behind a URL."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import wandb
from lightning.pytorch.loggers import WandbLogger

from dsv3.evaluation.benchmarks import chance
from dsv3.evaluation.benchmarks.compare import comparison
from dsv3.evaluation.benchmarks.models import HFModel, NativeModel
from dsv3.evaluation.benchmarks.remote import RemoteAdapter
from dsv3.evaluation.benchmarks.results import ResultsFolder, scores
from dsv3.evaluation.benchmarks.suite import Entry, Suite
from dsv3.evaluation.benchmarks.tasks import RunTexts, TaskFinder, UnavailableError
from dsv3.inference.endings import score_endings
from dsv3.sandbox import Sandbox
from dsv3.training.callbacks.run_benchmarks import Benchmarks
from tests.evaluation.benchmarks.conftest import suite_of
from tests.stand_in import JSONHandler, answering

PROMPTS = [[5, 6, 7, 8] * 3, [9], list(range(3, 200)) * 2]
ENDINGS = [[[1], [2, 3], [2, 4], [2, 4, 5]], [[7, 7, 7]], [[1], [9, 8]]]


@pytest.mark.parametrize("kind", ["ours", "transformers"])
def test_likelihoods_of_endings_equal_one_row_at_a_time(
    kind: str, own_model: NativeModel, hugging_face_folder: Path
) -> None:
    """Prompts of unlike length, one of them read in two pieces; endings of several tokens, some with one beginning."""
    model: Any = own_model if kind == "ours" else HFModel(hugging_face_folder)
    backend = model.backend()
    for prompt, endings, found in zip(PROMPTS, ENDINGS, score_endings(backend, PROMPTS, ENDINGS), strict=True):
        for ending, score in zip(endings, found, strict=True):
            logits = model.logits([[*prompt, *ending[:-1]]], [len(ending)], [0])[0].log_softmax(-1)
            assert score == pytest.approx(float(logits.gather(1, torch.tensor(ending)[:, None]).sum()), abs=1e-4)


def test_a_group_of_task_types_is_a_benchmark(own_model: NativeModel, tmp_path: Path) -> None:
    """Scores with standard errors and baselines; every episode in the samples; the same twice."""
    own_model.max_length = 1024  # its tokens are bytes
    entry = Entry(limit=2, steps=3, actions="likelihood", history=1)
    outcome = suite_of(own_model, batch_size=8).run("babyai", entry)
    rows = {(row.task, row.metric): row for row in scores(outcome.results, outcome.shots_used)}
    assert rows["babyai_goto", "progress"].n == 2
    assert {"progress", "random", "expert"} <= {metric for task, metric in rows if task == "babyai"}
    assert not any(metric == "answer_bpb" for _, metric in rows)
    (first, *_) = outcome.samples["babyai_goto"]
    assert first["resps"][0][0]["trajectory"][0]["rows"] == 8
    assert first["filtered_resps"][0].startswith("progress 0.00: ")
    again = suite_of(own_model, batch_size=8).run("babyai_goto", entry)
    hashes = [[one["resps"][0][0]["trajectory_hash"] for one in o.samples["babyai_goto"]] for o in (outcome, again)]
    assert hashes[0] == hashes[1]
    folder, other = ResultsFolder(tmp_path / "one"), ResultsFolder(tmp_path / "other")
    folder.write("babyai", "key", outcome)
    other.write("babyai_goto", "key", again)
    compared = {row.metric: row for row in comparison(other, folder, ["babyai_goto"])}
    assert (compared["progress"].n, compared["progress"].difference) == (2, 0), "paired by episode"
    assert compared["progress"].interval is not None
    assert compared["steps"].stderr == 0
    said = chance.line("babyai_goto", folder.samples("babyai_goto"))
    assert said is not None
    assert "no significant difference from random" in said
    assert "2 episodes, actions by likelihood, history 0.67" in said
    assert chance.line("other", [{"metrics": ["exact_match"]}]) is None


def test_only_an_interval_above_zero_is_better_than_random() -> None:
    def samples(*pairs: tuple[float, float]) -> list[dict[str, Any]]:
        return [{"metrics": ["progress", "random"], "progress": own, "random": by_chance} for own, by_chance in pairs]

    def verdict(*pairs: tuple[float, float]) -> str:
        found = chance.against_random(samples(*pairs))
        assert found is not None
        return found.verdict

    assert verdict(*[(1, 0)] * 30) == "better than random"
    assert verdict(*[(0, 1)] * 30) == "worse than random"
    assert verdict((1, 0)) == verdict((0.5, 0.1)) == "no significant difference from random"
    assert verdict(*[(1, 0)] * 3) == "no significant difference from random"  # exact, not normal: three are too few
    assert verdict((0.5, 0.1), (0.4, 0.1), (0.5, 0.2)) == "better than random"


class Api(JSONHandler):
    """A model of bytes that prefers the letter g; `abilities` says what the server gives."""

    abilities: tuple[str, ...] = ()
    posted: list[dict[str, Any]]

    def do_GET(self) -> None:
        self.answer({"data": [{"id": "letters"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.content())
        self.posted.append(asked)
        if "messages" in asked:
            self.answer({"choices": [{"message": {"content": "go forward\nand more"}}]})
            return
        choice: dict[str, Any] = {"text": " go forward"}
        if asked.get("echo") and "logprobs" in self.abilities:
            letters = asked["prompt"] + "!"
            values = [None, *(-0.1 if letter == "g" else -1.0 for letter in letters[1:])]
            choice["logprobs"] = {"text_offset": list(range(len(letters))), "token_logprobs": values}
        self.answer({"choices": [choice]})


@pytest.fixture
def url() -> Iterator[str]:
    Api.posted = []
    with answering(Api) as url:
        yield f"{url}/v1"


def remote_suite(url: str, *, chat: bool = False) -> Suite:
    adapter = RemoteAdapter(url, served_model=None, at_once=4, seed=1, chat=chat)
    finder = TaskFinder(["plugins/benchmarks"], run=RunTexts(None), datasets_folder=None)
    return Suite(adapter, finder, Sandbox(), seed=1)


def test_a_model_behind_a_url_plays(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for chat in (False, True):
        played = remote_suite(url, chat=chat).run("babyai_goto", Entry(limit=2, steps=3, actions="text"))
        (first, _) = played.samples["babyai_goto"]
        assert [step["action"] for step in first["resps"][0][0]["trajectory"]] == ["go forward"] * 3
    monkeypatch.setattr(Api, "abilities", ("logprobs",))
    played = remote_suite(url).run("babyai_goto", Entry(limit=1, steps=2))
    step = played.samples["babyai_goto"][0]["resps"][0][0]["trajectory"][0]
    by_hand = {action: -sum(0.1 if c == "g" else 1.0 for c in f" {action}") for action in step["log_likelihoods"]}
    assert step["log_likelihoods"] == pytest.approx(by_hand)
    assert step["action"] == "drop"  # the shortest
    assert {asked["model"] for asked in Api.posted} == {"letters"}


def test_likelihoods_that_a_server_does_not_give_are_refused_by_name(url: str) -> None:
    with pytest.raises(UnavailableError, match=r"likelihoods need `echo` with `logprobs`.*actions=text"):
        remote_suite(url).run("babyai_goto", Entry(limit=1, steps=2))
    with pytest.raises(UnavailableError, match="use chat=false, or for agents actions=text"):
        remote_suite(url, chat=True).run("babyai_goto", Entry(limit=1, steps=2))


def test_a_url_without_a_server_is_named() -> None:
    with pytest.raises(ValueError, match=r"checkpoint=http://127\.0\.0\.1:9: must be the /v1 of an OpenAI-compatible"):
        RemoteAdapter("http://127.0.0.1:9", served_model=None, at_once=1, seed=1, chat=False)


def test_wandb_gets_scores_pages_and_gifs(
    own_model: NativeModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own_model.max_length = 1024
    outcome = suite_of(own_model).run("babyai_goto", Entry(limit=1, steps=2))
    logged: dict[str, Any] = {}
    monkeypatch.setattr(WandbLogger, "log_metrics", lambda self, metrics: logged.update(metrics))
    trainer = SimpleNamespace(loggers=[WandbLogger.__new__(WandbLogger)])
    rows = list(scores(outcome.results, outcome.shots_used))
    Benchmarks(every_tokens=None, before=False)._log(trainer, tmp_path, 10, rows, outcome)
    assert logged["benchmarks/babyai_goto/progress"] == 0
    assert isinstance(logged["benchmarks/babyai_goto/best"], wandb.Html)
    assert isinstance(logged["benchmarks/babyai_goto/best_gif"], wandb.Video)
    assert "Mission: go to" in next(tmp_path.glob("episodes/*.html")).read_text()
    (step, _) = outcome.episodes["babyai_goto"][0]["trajectory"]
    for used in step["experts"].values():
        assert 0 < sum(share for _, share in used) <= 1.001
