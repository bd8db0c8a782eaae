"""Competition problems to train on: none is asked in the benchmark, and both are asked in the same words."""

import pytest
import yaml

from data.competition import conversations, prompts
from dsv3.paths import ROOT
from dsv3.verifiers import final_integer
from dsv3.verifiers.competition import LEVELS
from plugins.benchmarks.competition.problems import load

SETTINGS = {"levels": [1, 2, 3], "each": 40, "seed": 0, "weight": 1.0}


def test_training_asks_as_the_benchmark_does_and_nothing_that_it_asks() -> None:
    task = yaml.load((ROOT / "plugins/benchmarks/competition/_competition_yaml").read_text(), Loader=Lenient)
    asked = task["doc_to_text"]
    test = {row["problem"]: row["answer"] for level in LEVELS for row in load(level=level, each=10)["test"]}
    train = [row for _, row in conversations(**SETTINGS).rows()]
    assert len(train) > 500
    assert len(test) > 200
    questions = {row["messages"][0]["content"] for row in train}
    assert not questions & {asked.replace("{{problem}}", problem) for problem in test}
    prefix, suffix = asked.split("{{problem}}")
    assert all(question.startswith(prefix) and question.endswith(suffix) for question in questions)


class Lenient(yaml.SafeLoader):
    """Reads lm-eval's `!function` as text."""


Lenient.add_constructor("!function", lambda loader, node: str(node.value))


def test_prompts_are_the_same_problems_with_their_answers() -> None:
    told = {row["messages"][0]["content"]: row["messages"][1]["content"] for _, row in conversations(**SETTINGS).rows()}
    asked = {row["prompt"]: row["answer"] for _, row in prompts(**SETTINGS).rows()}
    assert {question: final_integer(reply) for question, reply in told.items()} == asked
    with pytest.raises(ValueError, match=r"levels=\[4\]: must be among 1, 2, 3"):
        prompts(**SETTINGS | {"levels": [4]})
