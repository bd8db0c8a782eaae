"""A study from its command to its report: paired arms, resumed where it was interrupted."""

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir

from dsv3.build import build_model
from dsv3.checkpoint.run_folder import RunFolder
from dsv3.cli import main
from dsv3.config.arms import expanded
from dsv3.config.preflight import check
from dsv3.reporting.study_results import Study, at_equal, headline, read_study
from dsv3.study.run_queue import read_queue
from dsv3.tools import report
from tests.commands import attempt, call, call_python, start
from tests.conftest import ROOT
from tests.reporting.test_study_results import made

EXPERIMENTS = sorted(
    path.stem
    for path in (ROOT / "conf" / "experiment").glob("*.yaml")
    if "arms:" in path.read_text() and "grid:" not in path.read_text()  # of which one arm is enough
)
SMALL = [
    "--config-dir", str(ROOT / "tests" / "conf"), "experiment=table5_balancing", "model=tiny", "data=synthetic",
    "precision=fp32", "model.n_layers=2",
    "tokenizer=bytes", "logger=none", "run.tokens=5120", "run.checkpoint_every_tokens=2560",
    "run.validate_every_tokens=2560", "callbacks.monitor.every_tokens=2560",
    "study.only=[sequence_aux,loss_free]", "study.seeds=[1,2]",
    "benchmarks.tasks.rg_arithmetic.limit=4", "~benchmarks.tasks.gsm8k_100_answers",
]  # fmt: skip


OF_A_CLOCK = ("held-out text at equal seconds", "training speed")


def study(folder: Path) -> list[str]:
    """The command."""
    return ["train.py", "-m", *SMALL, f"run.dir={folder}/${{study.arm}}/seed${{seed}}", f"hydra.sweep.dir={folder}"]


def assert_ended(done: subprocess.CompletedProcess[str], folder: Path) -> None:
    assert "By held-out text at equal tokens, " in done.stdout, "a study ends with its verdict"
    assert (folder / "report.html").exists()


def numbers(folder: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """What the report says, but for what a clock had a say in and where it was written."""
    capsys.readouterr()
    assert main(["report", str(folder), "format=json"]) == 0
    sections = json.loads(capsys.readouterr().out)["sections"]
    for section in sections:
        of_a_clock = [
            row for row in section["rows"] if str(row.get("metric", row.get("figure"))).startswith(OF_A_CLOCK)
        ]
        section["rows"] = [row for row in section["rows"] if row not in of_a_clock]
        for row in section["rows"]:
            row.pop("training speed", None)
        beginnings = tuple(f"By {metric}, " for metric in OF_A_CLOCK)  # where a difference is shown, by chance too
        section["sentences"] = [s for s in section["sentences"] if not s.startswith(beginnings)]
    return [section for section in sections if section["sentences"] or section["rows"]]


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [[1], [1, 2]], ids=["a seed", "two seeds"])
def test_interrupted_study_continues_and_its_report_equals_that_of_an_uninterrupted_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], seeds: list[int]
) -> None:
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    with_seeds = f"study.seeds={seeds}".replace(" ", "")
    assert_ended(call_python(ROOT, *study(whole), with_seeds), whole)
    process = start(ROOT, *study(stopped), with_seeds)
    second = stopped / "loss_free" / "seed1"
    while not RunFolder(second).checkpoints():  # the first run is over, the second has begun
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGINT, errors
    done = stopped / "sequence_aux" / "seed1" / "summary.json"
    before = done.stat().st_mtime_ns
    assert_ended(call(ROOT, *study(stopped), with_seeds), stopped)
    assert done.stat().st_mtime_ns == before, "a finished arm is not trained again"
    assert numbers(stopped, capsys) == numbers(whole, capsys)
    read = read_study(whole)
    assert {arm: sorted(runs) for arm, runs in read.runs.items()} == {"sequence_aux": seeds, "loss_free": seeds}
    metric = at_equal(read, "tokens")
    ends = [run.summary["validation"]["after"]["all"]["bpb"] for run in read.runs["loss_free"].values() if run.summary]
    assert read.values(metric, "loss_free", seeds) == pytest.approx(ends)
    text = (whole / "report.md").read_text()
    assert "By held-out text at equal tokens, loss_free" in text
    assert "sequence_aux" in text
    assert "](report.png)" in text
    assert "](report_domains.png)" in text
    assert (whole / "report.png").exists()
    assert (whole / "report_domains.png").exists()
    assert "plotly" in (whole / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_second_worker_finishes_a_study_whose_first_is_killed_and_its_report_is_that_of_one_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone, shared = tmp_path / "alone", tmp_path / "shared"
    assert_ended(call(ROOT, *study(alone), "study.seeds=[1]"), alone)
    first = start(ROOT, *study(shared), "study.seeds=[1]")
    while not RunFolder(shared / "sequence_aux" / "seed1").checkpoints():
        assert first.poll() is None, first.communicate()[1]
        time.sleep(0.02)
    second = start(ROOT, "-m", "dsv3", "work", str(shared), "--config-dir", str(ROOT / "tests" / "conf"))
    while len({run.worker for run in read_queue(shared) if run.state == "running"}) < 2:
        assert first.poll() is None, "the first worker trained all runs before the second began"
        assert second.poll() is None, second.communicate()[1]
        time.sleep(0.02)
    first.send_signal(signal.SIGKILL)
    output, errors = second.communicate(timeout=700)
    assert second.returncode == 0, errors
    assert "By held-out text at equal tokens, loss_free: one seed only" in output
    assert {run.state for run in read_queue(shared)} == {"finished"}
    assert numbers(shared, capsys) == numbers(alone, capsys)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_arms_of_a_shipped_study_share_their_initial_weights(experiment: str) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = compose("train", overrides=[f"experiment={experiment}"])
        jobs = [job for batch in expanded([f"experiment={experiment}", "seed=1"], config.study) for job in batch]
        assert len(jobs) >= 2
        assert config.study.baseline in config.study.arms
        models = [build_model(compose("train", overrides=job)).state_dict() for job in jobs]
    for other in models[1:]:
        shared = [key for key in models[0] if key in other and other[key].shape == models[0][key].shape]
        assert "embed_tokens.weight" in shared
        assert all(torch.equal(models[0][key], other[key]) for key in shared if key.endswith("weight"))


def test_a_stage_begins_with_the_one_before_and_arms_share_their_first_stages() -> None:
    arms = {"short": ["x=1"], "long": [["x=1"], ["y=2"]], "other": [["x=2"], ["y=2"]], "third": [["x=2"], ["y=3"]]}
    first, second = expanded(["k=v"], {"arms": arms, "only": None, "seeds": [1]})
    shared = next(run[4] for run in first if "x=2" in run)
    assert shared.startswith("run.name=stages/")
    assert first == [
        ["x=1", "k=v", "study.arm=short", "study.stage=1", "run.name=short/seed${seed}", "seed=1"],
        ["x=2", "k=v", "study.arm=null", "study.stage=1", shared, "seed=1"],
    ]
    begins = {"long": "short/seed${seed}", "other": shared.partition("=")[2], "third": shared.partition("=")[2]}
    own = {"long": "y=2", "other": "y=2", "third": "y=3"}
    assert second == [
        [
            own[name],
            "k=v",
            f"study.arm={name}",
            "study.stage=2",
            f"run.name={name}/seed${{seed}}",
            f"run.init_from=runs/${{run.experiment}}/{begins[name]}",
            "seed=1",
        ]
        for name in own
    ]
    only = expanded(["k=v"], {"arms": arms, "only": ["long"], "seeds": [1]})
    assert [len(batch) for batch in only] == [1, 1]
    assert only[0][0][2:4] == ["study.arm=null", "study.stage=1"]


def test_every_arm_with_every_seed() -> None:
    arms = {"arms": {"a": ["x=1"], "b": []}, "only": None, "seeds": [1, 2]}
    assert expanded(["k=v"], arms) == [
        [
            ["x=1", "k=v", "study.arm=a", "seed=1"],
            ["k=v", "study.arm=b", "seed=1"],
            ["x=1", "k=v", "study.arm=a", "seed=2"],
            ["k=v", "study.arm=b", "seed=2"],
        ]
    ]
    assert expanded(["seed=7"], arms | {"only": ["b"]}) == [[["seed=7", "study.arm=b"]]]
    assert expanded(["seed=7"], {"arms": None}) == [[["seed=7"]]]
    with pytest.raises(ValueError, match=r"study\.only=c: there is no such arm\. Arms: a, b"):
        expanded([], arms | {"only": ["c"]})


@pytest.mark.parametrize(
    ("arguments", "key", "message"),
    [
        (["study.only=[loss_fre]"], "study.only", "there is no such arm"),
        (["study.baseline=mine"], "study.baseline", "must be one of sequence_aux, batch_aux, loss_free, none"),
        (["study.seeds=[]"], "study.seeds", "at least one seed"),
        (["study.arms.none=['balancing=nothing']"], "study.arms.none", "nothing"),
        (["study.arms.none=balancing"], "study.arms.none", "must be a list of overrides"),
        (["study.metric=nonsense"], "study.metric", "held-out code, held-out prose, held-out math, held-out all"),
        (["study.metric='exact answers'"], "study.metric", "this value is now called exact match"),
        (["study.metric='exact matches'"], "study.metric", "Did you mean 'exact match'?"),
        (["run.name=mine"], "run.dir", "12 runs would write to this folder"),
        (["run.name='of-${study.arm}'", "study.only=[none]"], "run.dir", "'seed=1' and 'seed=2'"),
        (["run.name='of-${study.arm}'", "seed=4,5", "study.only=[none]"], "run.dir", "2 runs would write"),
    ],
)
def test_mistakes_in_a_study_are_found_before_any_work(arguments: list[str], key: str, message: str) -> None:
    (problem,) = check("train", ["experiment=table5_balancing", *arguments])
    assert problem.key == key
    assert message in problem.message


@pytest.mark.parametrize(
    "arguments",
    [
        ["study.metric='held-out prose'"],
        ["study.metric='training loss, last 10% of tokens'"],
        ["study.metric='gsm8k_100_answers acc'", "benchmarks=quick"],
        ["study.metric='held-out letters'", "data=synthetic", f"hydra.searchpath=[file://{ROOT}/tests/conf]"],
        ["run.name='of-${study.arm}'", "seed=4"],
    ],
)
def test_metrics_and_folders_of_a_study_pass(arguments: list[str]) -> None:
    assert check("train", ["experiment=table5_balancing", *arguments]) == []


def test_runs_of_a_sweep_that_share_a_folder_are_refused_before_any_work() -> None:
    (problem,) = check("train", ["-m", "schedule.peak=1e-3,2e-3", "run.name=mine"])
    assert (problem.key, problem.value) == ("run.dir", "runs/default/mine")
    assert "'schedule.peak=0.001' and 'schedule.peak=0.002'" in problem.message


@pytest.mark.slow
def test_a_diverging_arm_leaves_the_others_to_run(tmp_path: Path) -> None:
    """The report names it, and the exit status is 1."""
    arms = "study.arms={bad:['schedule.peak=1e25','optimizer=adamw','callbacks.guard.on_nonfinite=roll_back'],good:[]}"
    small = [override for override in study(tmp_path) if "benchmarks.tasks" not in override]
    more = ["experiment=base_study", "benchmarks=none", "study.seeds=[1]", "study.only=null", "run.tokens=1280", arms]
    done = attempt(ROOT, *small, *more)
    assert done.returncode == 1, done.stderr
    assert "error: non-finite loss" in done.stderr
    assert "1 of 2 runs failed" in done.stderr
    assert "Failed, not included: bad/seed1 (non-finite loss" in done.stdout
    assert RunFolder(tmp_path / "good" / "seed1").summary() is not None
    assert "bad/seed1" in (tmp_path / "report.md").read_text()


def test_a_finished_study_is_reported_by_the_metric_that_is_set_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its runs recorded: they are not trained again."""
    for arm in ("a", "b"):
        made(tmp_path, arm, 1)
    reported: list[Study] = []
    monkeypatch.setattr(report, "write_study", lambda study, folder: reported.append(study))
    now = {"arms": {"a": [], "b": []}, "baseline": "b", "question": "Now?", "finding": None}
    report.report_of_ended(tmp_path, {**now, "metric": "training loss, last 10% of tokens"})
    report.report_of_ended(tmp_path, {**now, "metric": None})
    assert [headline(study).name for study in reported] == [
        "training loss, last 10% of tokens",
        "held-out text at equal tokens",
    ]
    assert [(study.baseline, study.question) for study in reported] == [("b", "Now?")] * 2


def test_a_folder_without_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["report", str(tmp_path)])
    assert "there is no finished run" in capsys.readouterr().err
