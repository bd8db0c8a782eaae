"""Competition mathematics as a benchmark: metrics of samples, files of the user's."""

import json
from pathlib import Path
from typing import Any

import pytest

from dsv3.evaluation.benchmarks.adapter import Adapter, Written
from dsv3.evaluation.benchmarks.models import NativeModel
from dsv3.evaluation.benchmarks.results import scores
from dsv3.evaluation.benchmarks.suite import Entry, Suite
from dsv3.evaluation.benchmarks.tasks import RunTexts, TaskFinder, UnavailableError
from dsv3.sandbox import Sandbox
from plugins.benchmarks.competition.problems import majority, score
from tests.evaluation.benchmarks.conftest import suite_of


def scored(*written: str, answer: int = 25) -> dict[str, float]:
    return score({"answer": answer}, [[Written(text, truncated=text.endswith("...")) for text in written]])


def test_samples_give_pass_and_majority() -> None:
    right, wrong = r"\boxed{25}", r"\boxed{24}"
    found = scored(right, wrong, right, "no idea...")
    assert found["pass@1"] == 0.5
    assert found["pass@4"] == found["maj@4"] == found["maj@1"] == 1
    assert found["truncated"] == found["no_answer"] == 0.25
    assert "pass@8" not in found
    assert scored(wrong)["pass@1"] == 0


def test_a_majority_is_of_answers_and_the_first_of_equals() -> None:
    assert majority([None, None, None, 3]) == 3
    assert majority([5, 3, 3, 5]) == 5
    assert majority([None]) is None


def test_a_model_is_asked_for_samples_that_differ(own_model: NativeModel) -> None:
    """A random model has no answer, and is cut off."""
    outcome = suite_of(own_model, batch_size=16).run("competition_1", Entry(limit=1, num_samples=4))
    rows = {row.metric: row.value for row in scores(outcome.results, outcome.shots_used)}
    assert rows["pass@1"] == rows["maj@4"] == rows["pass@4"] == 0
    assert rows["truncated"] > 0
    assert rows["no_answer"] == 1
    (sample,) = outcome.samples["competition_1"]
    assert len({*sample["resps"][0]}) == 4
    assert sample["target"] == rf"\boxed{{{sample['doc']['answer']}}}"
    assert sample["arguments"][0][0].endswith("\nGive the answer, a whole number, in \\boxed{}.\nSolution:")


def test_the_first_documents_are_of_all_templates(own_model: NativeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a group's score pools its levels; a model that boxes the answer scores 1."""

    def boxed(self: Adapter, requests: list[Any]) -> list[Written]:
        return [Written(rf"\boxed{{{request.doc['answer']}}}", truncated=False) for request in requests]

    monkeypatch.setattr(Adapter, "generate_until", boxed)
    monkeypatch.setattr(Adapter, "loglikelihood", lambda self, requests, **_: [(-1.0, False)] * len(requests))
    outcome = suite_of(own_model).run("competition", Entry(limit=5))
    assert outcome.results["results"]["competition"]["pass@1,samples"] == 1
    assert all(len({sample["doc"]["template"] for sample in of_task}) == 5 for of_task in outcome.samples.values())


def files_suite(model: Any, folder: Path) -> Suite:
    finder = TaskFinder(["plugins/benchmarks"], run=RunTexts(None), datasets_folder=str(folder))
    return Suite(Adapter(model, batch_size=4, seed=1), finder, Sandbox(), seed=1)


def test_problems_of_the_users_files(own_model: NativeModel, tmp_path: Path) -> None:
    folder = tmp_path / "competition" / "problems"
    folder.mkdir(parents=True)
    rows = [{"problem": "What is 20 + 5?", "answer": "025", "source": "mine"}, {"problem": "What is 1?", "answer": "1"}]
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    outcome = files_suite(own_model, tmp_path).run("competition_files", Entry())
    assert [sample["doc"]["answer"] for sample in outcome.samples["competition_files"]] == [25, 1]
    (folder / "mine.jsonl").write_text(json.dumps({"problem": "What is half of 1?", "answer": "1/2"}))
    with pytest.raises(UnavailableError, match="row 1: answer='1/2': must be a whole number"):
        files_suite(own_model, tmp_path).run("competition_files", Entry())
    with pytest.raises(UnavailableError, match="datasets_folder=FOLDER is searched"):
        suite_of(own_model).run("competition_files", Entry())
