"""train.py, evaluate.py and `python -m dsv3 generate` as a user calls them, from another directory.

Training runs in an interpreter of its own, what reads the run in forked processes (tests/commands.py).
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from dsv3.checkpoint.run_folder import RunFolder
from dsv3.cli import main
from dsv3.reporting.workspace import described
from tests.commands import attempt, call, call_python
from tests.conftest import ROOT

SOURCE = f"{{_target_: data.sources.local_files, path: {ROOT / 'dsv3'}, text_column: text, weight: 1.0}}"
SETTINGS = [
    "--config-dir", str(ROOT / "tests" / "conf"), "model=tiny", "data=small_files", "tokenizer.vocab_size=320",
    f"+data.sources.code={SOURCE}",
    "data.held_out_fraction=0.2", "trainer.max_steps=20", "run.checkpoint_every_tokens=2560",
    "run.validate_every_tokens=2560", "benchmarks=none",
    "data.sequence_length=128", "data.micro_batch_size=2", "data.global_batch_size.peak=2",
    "precision=bf16", "schedule.total_tokens=5120",
]  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run made in a folder of its own, with wandb offline, from another current directory."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    run = tmp_path_factory.mktemp("runs") / "run"
    cache = tmp_path_factory.mktemp("cache")
    call_python(elsewhere, "train.py", *SETTINGS, f"run.dir={run}", f"data.cache_dir={cache}")
    assert list(elsewhere.iterdir()) == []
    return run


def test_run_folder_holds_what_the_readme_says(trained: Path) -> None:
    folder = RunFolder(trained)
    assert {"config.yaml", "checkpoints", "metrics", "timing", "summary.json", "tokenizer", "wandb"} <= {
        path.name for path in trained.iterdir()
    }
    train = folder.read("metrics/train")
    assert train.tokens.tolist() == [256 * i for i in range(1, 21)]
    assert train.loss[-5:].mean() < train.loss[:5].mean() - 0.5
    assert {"bpb", "grad_norm", "lr", "mtp1_loss", "mtp1_accuracy", "mtp_weight", "max_violation/mtp.0"} <= set(train)
    experts = folder.read("metrics/experts")
    assert set(experts.layer) == {"layers.1", "layers.2", "mtp.0"}
    loads = torch.tensor(experts[experts.layer == "layers.1"].load.tolist())
    assert (loads.sum(1) == 256 * 2).all()
    timing = folder.read("timing/train")
    assert timing.tokens.tolist() == train.tokens.tolist()
    assert not any("second" in column for table in ("train", "experts") for column in folder.read(f"metrics/{table}"))
    assert json.loads((trained / "run_info.json").read_text())["tokens"] == 20 * 256
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["tokens"] == 5120
    assert summary["steps"] == 20
    assert summary["validation"]["before"]["code"]["bpb"] > summary["validation"]["after"]["code"]["bpb"]
    assert {"seed", "parameters", "tokens_per_second", "max_violation", "samples", "versions"} <= set(summary)
    assert summary["seconds"] == pytest.approx(timing.seconds.sum(), abs=0.1)
    assert summary["peak_memory_bytes"] == {"resident": timing.peak_resident_bytes.max()}
    assert (timing.peak_resident_bytes.diff().dropna() >= 0).all()
    assert timing.peak_resident_bytes.iloc[0] > 50_000_000
    assert timing.seconds_left.iloc[-1] == 0
    assert (timing.seconds_left.iloc[:-1] > 0).all()


def test_wandb_run_has_tokens_as_its_axis(trained: Path) -> None:
    """The offline run's own records: the step metric of every metric is `tokens`."""
    (run,) = (trained / "wandb").glob("offline-run-*/run-*.wandb")
    content = run.read_bytes()
    assert b"train/loss" in content
    assert b"max_violation/layers.1" in content
    assert b"tokens" in content
    assert (trained / "wandb_id").read_text() in run.name


def test_every_panel_of_the_workspace_has_figures_of_a_run(trained: Path) -> None:
    (run,) = (trained / "wandb").glob("offline-run-*/run-*.wandb")
    logged = set(re.findall(r"[\w./]+", run.read_bytes().decode("latin-1")))
    sections = {section.name: section.panels for section in described(project="p", entity="e").sections}
    for name in ("Loss", "Balance", "Load of the experts"):
        for panel in sections[name]:
            patterns = [panel.metric_regex] if getattr(panel, "metric_regex", None) else []
            keys = [*(getattr(panel, "y", None) or []), *(getattr(panel, "media_keys", None) or [])]
            patterns += [re.escape(getattr(key, "name", key)) + r"(\.\w+)?$" for key in keys]
            assert patterns, panel
            for pattern in patterns:
                assert any(re.search(pattern, key) for key in logged), f"{name}: nothing is logged as {pattern}"


def test_evaluate_scores_both_weights_and_equals_the_summary(trained: Path, tmp_path: Path) -> None:
    done = call(tmp_path, "evaluate.py", f"checkpoint={trained}", "format=json")
    result = json.loads(done.stdout)
    summary = json.loads((trained / "summary.json").read_text())
    for weights, when in (("live", "after"), ("ema", "ema")):
        scores = result["weights"][weights]["domains"]
        assert scores["code"]["bpb"] == pytest.approx(summary["validation"][when]["code"]["bpb"], rel=1e-6)
    assert json.loads((trained / "evaluation.json").read_text()) == result
    text = call(tmp_path, "evaluate.py", f"checkpoint={RunFolder(trained).checkpoints()[0]}").stdout
    assert "bits per byte" in text
    assert "code" in text


def test_evaluate_keeps_to_the_tokenizer_of_the_run(trained: Path, tmp_path: Path) -> None:
    """A tokenizer trained anew on other texts would give other ids: the model's own is the one that counts."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    config = OmegaConf.load(run / "config.yaml")
    config.tokenizer.sample_characters = 1000
    OmegaConf.save(config, run / "config.yaml")
    result = json.loads(call(tmp_path, "evaluate.py", f"checkpoint={run}", "format=json").stdout)
    wanted = json.loads((trained / "summary.json").read_text())["validation"]["after"]["code"]["bpb"]
    assert result["weights"]["live"]["domains"]["code"]["bpb"] == pytest.approx(wanted, rel=1e-6)


@pytest.mark.slow
def test_evaluate_runs_benchmarks_continues_and_compares(trained: Path, tmp_path: Path) -> None:
    """Two tasks and one whose data are on the hub; a second call computes nothing again; another checkpoint beside."""
    other = RunFolder(trained).checkpoints()[0]
    command = [
        "evaluate.py", f"checkpoint={trained}", "tasks=[stdlib_infilling,rg_arithmetic,gsm8k]",
        "limit=4", f"compare={other}", "format=json",
    ]  # fmt: skip
    result = json.loads(call(tmp_path, *command).stdout)
    scores = result["benchmarks"]["results"]
    assert set(scores) == {"stdlib_infilling", "rg_arithmetic"}
    assert scores["stdlib_infilling"]["answer_bpb_stderr,none"] > 0
    assert "its data cannot be reached" in result["benchmarks"]["dsv3"]["failures"]["gsm8k"]
    folder = trained / "benchmarks" / "newest-live"
    assert json.loads((folder / "results.json").read_text())["n-samples"]["rg_arithmetic"]["effective"] == 4
    assert len((folder / "samples_rg_arithmetic.jsonl").read_text().splitlines()) == 4
    compared = {(row["task"], row["metric"]): row for row in result["compare"]}
    assert compared["rg_arithmetic", "answer_bpb"]["n"] == 4
    assert compared["rg_arithmetic", "answer_bpb"]["difference"] != 0
    assert set(result["expert_load"]) == {"layers.1", "layers.2"}

    before = (folder / "tasks" / "rg_arithmetic.json").stat().st_mtime_ns
    text = call(tmp_path, *command[:-1]).stdout
    assert "skipped gsm8k: its data cannot be reached" in text
    assert (folder / "tasks" / "rg_arithmetic.json").stat().st_mtime_ns == before
    unknown = attempt(tmp_path, "evaluate.py", f"checkpoint={trained}", "tasks=[no_such_task]")
    assert unknown.returncode == 2
    assert "there is no task no_such_task" in unknown.stderr
    assert not unknown.stdout, "found before anything is scored"


@pytest.mark.slow
def test_evaluate_reads_a_hugging_face_folder(trained: Path, tmp_path: Path) -> None:
    call(tmp_path, "-m", "dsv3", "export", f"checkpoint={trained}", f"out={tmp_path}/hf")
    command = ["evaluate.py", f"checkpoint={tmp_path}/hf", "tasks=[rg_arithmetic,stdlib_infilling]"]
    result = json.loads(call(tmp_path, *command, "limit=3", f"output_path={tmp_path}/out", "format=json").stdout)
    assert set(result["benchmarks"]["results"]) == {"rg_arithmetic"}
    assert "has no run with any" in result["benchmarks"]["dsv3"]["failures"]["stdlib_infilling"]
    run = ["evaluate.py", f"checkpoint={trained}", "tasks=[rg_arithmetic]", "limit=3", "format=json"]
    ours = json.loads(call(tmp_path, *run).stdout)["benchmarks"]["results"]["rg_arithmetic"]["answer_bpb,none"]
    theirs = result["benchmarks"]["results"]["rg_arithmetic"]["answer_bpb,none"]
    assert theirs == pytest.approx(ours, rel=0.02)  # bf16 here, the exported weights' own format there


def test_generate_completes_and_fills_in(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = ["-m", "dsv3", "generate", f"checkpoint={trained}", "prompt=def f(", "max_tokens=8"]
    result = json.loads(call(tmp_path, *base, "format=json").stdout)
    assert result["tokens"] <= 8
    text = call(tmp_path, *base).stdout
    assert text == f"def f({result['text']}\n"
    filled = json.loads(call(tmp_path, *base, "suffix=):", "weights=ema", "format=json").stdout)
    assert filled["suffix"] == "):"
    sampled = [
        json.loads(call(tmp_path, *base, "temperature=1", f"seed={seed}", "format=json").stdout)["text"]
        for seed in (1, 2)
    ]
    assert main([*base[2:], "temperature=1", "seed=1", "format=json"]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == sampled[0] != sampled[1], "in another process too"


def test_generate_with_drafts_gives_the_same_text_and_says_how_they_fared(trained: Path, tmp_path: Path) -> None:
    base = ["-m", "dsv3", "generate", f"checkpoint={trained}", "prompt=def f(", "max_tokens=12", "format=json"]
    plain, drafted = (
        json.loads(call(tmp_path, *base, f"speculative={on}", "drafts=2").stdout) for on in ("false", "true")
    )
    assert drafted["text"] == plain["text"]
    assert "acceptance" not in plain
    assert 0 <= drafted["acceptance"] <= 1
    assert drafted["tokens_per_pass"] >= 1
    text = call(tmp_path, *base[:-1], "speculative=true", "drafts=1")
    assert "tokens_per_second" in text.stderr
    assert "acceptance" in text.stderr


def test_trap_17_evaluate_py_does_not_hide_hugging_faces_package(tmp_path: Path) -> None:
    package = tmp_path / "evaluate"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (tmp_path / "sitecustomize.py").write_text(
        "import atexit\natexit.register(lambda: print('found', __import__('evaluate').__file__))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / "evaluate.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert f"found {package / '__init__.py'}" in done.stdout, done.stderr


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["evaluate.py", "checkpoint=/nowhere"], "checkpoint=/nowhere: must be a run folder"),
        (["-m", "dsv3", "generate", "checkpoint=/nowhere"], "checkpoint=/nowhere: there is no such file or folder"),
    ],
)
def test_a_missing_checkpoint_is_named(command: list[str], says: str) -> None:
    done = attempt(ROOT, *command)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr
