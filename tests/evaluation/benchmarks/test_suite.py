"""Running tasks: a user's YAML, shots that fit, bits per byte, results that are written, continued and compared."""

import json
import logging
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dsv3.evaluation.benchmarks.compare import comparison
from dsv3.evaluation.benchmarks.models import NativeModel
from dsv3.evaluation.benchmarks.results import ResultsFolder, scores, settings_key
from dsv3.evaluation.benchmarks.suite import Entry
from dsv3.evaluation.benchmarks.tasks import UnavailableError
from tests.evaluation.benchmarks.conftest import Texts, suite_of

CAPITALS = """
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {path}}}
test_split: train
fewshot_split: train
fewshot_config: {{sampler: first_n}}
output_type: {output_type}
doc_to_text: "The capital of {{{{country}}}} is"
doc_to_target: "{{{{capital}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 6, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
ROWS = [("France", "Paris"), ("Peru", "Lima"), ("Japan", "Tokyo"), ("Kenya", "Nairobi"), ("Cuba", "Havana")]


@pytest.fixture
def capitals(tmp_path: Path) -> Path:
    """A folder with a user's task."""
    folder = tmp_path / "mine"
    folder.mkdir()
    lines = [json.dumps({"country": country, "capital": capital}) for country, capital in ROWS]
    (folder / "capitals.jsonl").write_text("\n".join(lines))
    text = CAPITALS.format(path=folder / "capitals.jsonl", output_type="generate_until")
    (folder / "capitals.yaml").write_text(text)
    return folder


def test_a_users_yaml_is_a_benchmark_with_bits_per_byte(own_model: NativeModel, capitals: Path) -> None:
    outcome = suite_of(own_model, str(capitals)).run("capitals", Entry())
    samples = outcome.samples["capitals"]
    assert [sample["target"] for sample in samples] == [capital for _, capital in ROWS]
    bits = 0.0
    for country, capital in ROWS:
        context = own_model.encode(f"The capital of {country} is", bos=True)
        answer = own_model.encode(f" {capital}", bos=False)
        logits = own_model.logits([[*context, *answer[:-1]]], [len(answer)], [0])[0].double().log_softmax(-1)
        bits -= float(logits.gather(1, torch.tensor(answer)[:, None]).sum()) / math.log(2)
    n_bytes = sum(len(capital) + 1 for _, capital in ROWS)
    assert outcome.results["results"]["capitals"]["answer_bpb,none"] == pytest.approx(bits / n_bytes, rel=1e-5)
    assert outcome.results["results"]["capitals"]["answer_bpb_stderr,none"] > 0
    assert sum(sample["answer_bytes"] for sample in samples) == n_bytes


@pytest.mark.parametrize(("length", "fit"), [(256, 4), (105, 2), (40, 0)])
def test_examples_that_do_not_fit_are_dropped_from_the_left(
    own_model: NativeModel, capitals: Path, length: int, fit: int
) -> None:
    """Of four examples (26 to 32 bytes each, line breaks included) the last few stay, whole."""
    own_model.max_length = length
    outcome = suite_of(own_model, str(capitals)).run("capitals", Entry(num_fewshot=4, limit=1))
    prompt = outcome.samples["capitals"][0]["arguments"][0][0]
    kept = [f"The capital of {country} is {capital}\n\n" for country, capital in ROWS[1:5]][4 - fit :]
    assert prompt == "".join(kept) + "The capital of France is"
    assert outcome.shots_used == {"capitals": fit}


def test_choices_and_likelihoods_give_bits_without_further_passes(own_model: NativeModel) -> None:
    outcome = suite_of(own_model).run("hellaswag_100", Entry(limit=3))
    for sample in outcome.samples["hellaswag_100"]:
        gold = int(sample["target"])
        assert sample["answer_bits"] == pytest.approx(-sample["resps"][gold][0][0] / math.log(2))
        assert sample["answer_bytes"] == len(f" {sample['doc']['choices'][gold]}".encode())


def test_groups_pool_their_documents(own_model: NativeModel) -> None:
    outcome = suite_of(own_model).run("rg_bbh", Entry(limit=2, num_fewshot=0))
    pooled = [sample for samples in outcome.samples.values() for sample in samples]
    assert len(pooled) == 10
    bpb = sum(sample["answer_bits"] for sample in pooled) / sum(sample["answer_bytes"] for sample in pooled)
    assert outcome.results["results"]["rg_bbh"]["answer_bpb,none"] == pytest.approx(bpb)


def test_random_states_are_left_as_they_were(own_model: NativeModel, capitals: Path) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    suite_of(own_model, str(capitals)).run("capitals", Entry(temperature=1.0, num_fewshot=2))
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_several_samples_of_a_program_give_pass_at_k(own_model: NativeModel) -> None:
    suite = suite_of(own_model)
    if not suite.sandbox.usable:
        pytest.skip(str(suite.sandbox.refusal))
    outcome = suite.run("humaneval_164", Entry(limit=1, num_samples=10))
    assert outcome.results["results"]["humaneval_164"]["pass@10,sandbox"] == 0.0
    (sample,) = outcome.samples["humaneval_164"]
    assert len(set(sample["resps"][0])) > 1


def test_a_task_that_fails_says_why(own_model: NativeModel, capitals: Path) -> None:
    (capitals / "bad.py").write_text("def score(doc, results):\n    raise KeyError('no such thing')\n")
    text = (capitals / "capitals.yaml").read_text().replace("task: capitals", "task: bad")
    (capitals / "bad.yaml").write_text(text + "process_results: !function bad.score\n")
    with pytest.raises(UnavailableError, match="KeyError: 'no such thing'"):
        suite_of(own_model, str(capitals)).run("bad", Entry())


def test_results_are_lm_evals_and_are_not_computed_twice(
    own_model: NativeModel, capitals: Path, tmp_path: Path
) -> None:
    folder = ResultsFolder(tmp_path / "results")
    suite = suite_of(own_model, str(capitals), data=Texts())
    for name in ("capitals", "stdlib_infilling"):
        assert not folder.finished(name, settings_key(name))
        folder.write(name, settings_key(name), suite.run(name, Entry(limit=2)))
        assert folder.finished(name, settings_key(name))
        assert not folder.finished(name, settings_key(name, "other settings"))
    combined = folder.combine(["capitals", "stdlib_infilling"], about={"seed": 1}, failures={"gone": "no data"})
    written = json.loads((tmp_path / "results" / "results.json").read_text())
    assert {"results", "configs", "versions", "n-shot", "higher_is_better", "n-samples"} <= set(written)
    assert written["results"].keys() == {"capitals", "stdlib_infilling"}
    assert written["dsv3"]["failures"] == {"gone": "no data"}
    rows = {(row.task, row.metric): row for row in scores(combined, combined["dsv3"]["shots_used"])}
    assert rows["capitals", "exact_match"].n == 2
    assert rows["stdlib_infilling", "answer_bpb"].stderr > 0
    assert [sample["doc"]["country"] for sample in folder.samples("capitals")] == ["France", "Peru"]


def test_models_are_compared_document_by_document(own_model: NativeModel, capitals: Path, tmp_path: Path) -> None:
    folders = [ResultsFolder(tmp_path / name) for name in ("first", "second")]
    for folder in folders:
        folder.write("capitals", "key", suite_of(own_model, str(capitals)).run("capitals", Entry()))
        with torch.no_grad():
            own_model.model.get_parameter("lm_head.weight").zero_()
    rows = {row.metric: row for row in comparison(*folders, ["capitals"])}
    assert rows["exact_match"].difference == 0
    assert rows["exact_match"].p == 1
    assert rows["answer_bpb"].second == pytest.approx(math.log2(262), rel=1e-5)  # uniform: a byte is a token
    by_hand = rows["answer_bpb"].second - rows["answer_bpb"].first
    assert rows["answer_bpb"].difference == pytest.approx(by_hand)
    assert rows["answer_bpb"].n == len(ROWS)


@pytest.fixture(autouse=True)
def quiet_logs() -> Any:
    """lm-eval warns through the root logger's handlers; the level is put back."""
    level = logging.getLogger("lm_eval").level
    yield
    assert logging.getLogger("lm_eval").level == level
