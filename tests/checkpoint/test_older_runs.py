"""A run, its checkpoint and its export from before the packages were in layers still open, under today's names.

`tests/golden/run_of_before.tar.gz` was made at commit 1fc46de: six steps of a tiny model on twelve small files, and the
texts and scores that it gave there. What so short a run did not write is added in the form of that version.
"""

import json
import shutil
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from dsv3.checkpoint.loading import load_run
from dsv3.checkpoint.run_folder import RunFolder
from dsv3.cli import main
from dsv3.evaluation.evaluate import evaluate
from dsv3.inference.sampling import Chance
from dsv3.paths import CONF
from dsv3.reporting.history import History
from dsv3.training.callbacks.guard import skipped_updates
from dsv3.training.fit import fit
from dsv3.training.resume import refuse_other_settings
from dsv3.training.summary import show
from tests.conftest import ROOT

SETTINGS = {
    "greedy": [],
    "filled": ["suffix=return"],
    "sampled": ["temperature=0.9", "seed=4", "top_p=0.9"],
    "drafted": ["speculative=true"],
    "averaged": ["weights=ema"],
}


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with `run`, `export`, `texts` and `expected.json`."""
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(ROOT / "tests" / "golden" / "run_of_before.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    for name in ("config.yaml", "summary.json"):
        path = folder / "run" / name
        text = path.read_text()
        for mark, place in {"TEXTS": "texts", "CACHE": "cache", "RUN": "run"}.items():
            text = text.replace(f" {mark}\n", f" {folder / place}\n").replace(f'"{mark}"', f'"{folder / place}"')
        path.write_text(text)
    add_rare_records(RunFolder(folder / "run"))
    return folder


def add_rare_records(run: RunFolder) -> None:
    """A finding, a comparison of routings, an update left out and a scored family of questions."""
    finding = {
        "tokens": 1024,
        "layer": "mtp.0",
        "kind": "collapse",
        "expert": -1,
        "value": 1.0,
        "text": "mtp.0 collapsed",
    }
    run.table("metrics/findings").append(finding)
    run.table("metrics/stability").append({"tokens": 1024, "layer": "mtp.0", "kept": 0.75})
    run.flush(1024)
    (run.path / "spikes").mkdir()
    (run.path / "spikes" / "left_out.json").write_text("[512]")
    summary = json.loads(run.summary_path.read_text())
    score = {"questions": 4, "correct": 2, "baseline": 1, "lead_in_standard_errors": 0.76}
    run.summary_path.write_text(json.dumps(summary | {"questions": {"sisters": score}}))


@pytest.fixture(scope="module")
def expected(before: Path) -> dict[str, Any]:
    return json.loads((before / "expected.json").read_text())


@pytest.mark.parametrize("name", SETTINGS)
def test_generate_writes_the_same_text(
    before: Path,
    expected: dict[str, Any],
    name: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By the draws of that version: which token a seed draws has changed since, what it is drawn from has not."""
    monkeypatch.setattr(Chance, "draw", lambda self, p_V: int(torch.multinomial(p_V, 1, generator=self.generator)))
    call = ["generate", f"checkpoint={before / 'run'}", "prompt=def ", "max_tokens=24", "format=json"]
    assert main([*call, *SETTINGS[name]]) == 0
    assert json.loads(capsys.readouterr().out)["text"] == expected["texts"][name]


def test_evaluate_gives_the_same_scores(before: Path, expected: dict[str, Any]) -> None:
    out = before / "scores.json"
    with initialize_config_dir(str(CONF), version_base="1.3"):
        evaluate(compose("evaluate", overrides=[f"checkpoint={before / 'run'}", f"out={out}"]))
    now, then = json.loads(out.read_text()), expected["scores"]
    for weights in ("live", "ema"):
        for domain, scores in then["weights"][weights]["domains"].items():
            assert now["weights"][weights]["domains"][domain] == pytest.approx(scores, rel=1e-5)
    assert now["expert_load"] == then["expert_load"]


def test_report_is_written(before: Path) -> None:
    assert main(["report", str(before / "run")]) == 0
    page = (before / "run" / "report.html").read_text()
    assert "Training loss" in page
    assert "mtp1_loss" in page


def test_its_export_is_read_back(before: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import", f"path={before / 'export'}", f"out={before / 'imported'}", "format=json"]) == 0
    ours, theirs = load_run(before / "run").model, load_run(before / "imported").model
    live = ours.state_dict()
    for name, tensor in theirs.state_dict().items():
        if name in live and not name.endswith("counts"):
            torch.testing.assert_close(tensor, live[name], rtol=0, atol=0, msg=name)


def todays_config(before: Path, *overrides: str) -> DictConfig:
    """What the run's settings are called today; its steps were capped, its length was the default."""
    texts = f"{{_target_: data.sources.local_files, path: {before / 'texts'}, text_column: text, weight: 1.0}}"
    keys = [
        f"hydra.searchpath=[file://{ROOT}/tests/conf]",
        *("model=tiny", "data=small_files", "precision=bf16", "logger=none", "benchmarks=none"),
        *(f"model.{name}=16" for name in ("dim", "inter_dim")),
        *(
            f"model.{name}=8"
            for name in ("moe_inter_dim", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim")
        ),
        *("model.n_layers=2", "model.n_routed_experts=4", "model.top_k=1", "model.n_groups=2", "model.topk_groups=1"),
        "model.qk_rope_head_dim=4",
        *("router.group_score_top=2", "tokenizer.vocab_size=300", "model.vocab_size=300"),
        *("data.held_out_fraction=0.3", "data.validation_tokens=128", f"data.cache_dir={before / 'cache'}"),
        f"+data.sources.code={texts}",
        *("run.checkpoint_every_tokens=1536", "run.validate_every_tokens=1536", "run.keep_checkpoints=1"),
        *("callbacks.monitor.every_tokens=512", "trainer.accelerator=cpu", f"run.dir={before / 'run'}"),
    ]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", overrides=[*keys, *overrides])


def test_its_settings_are_those_of_todays_keys(before: Path) -> None:
    """Keys that have moved, keys and values with new names; another value is refused under its name of today."""
    folder = RunFolder(before / "run")
    refuse_other_settings(todays_config(before, "data.packing=windows"), folder)
    changed = ("callbacks.ema.decay=0.5", "callbacks.guard.min_rise=0.7", "attention.decode=naive")
    with pytest.raises(ValueError, match="different settings") as error:
        refuse_other_settings(todays_config(before, "data.packing=windows", *changed), folder)
    assert "callbacks.ema.decay: 0.99 there, 0.5 now" in str(error.value)
    assert "callbacks.guard.min_rise: 0.5 there, 0.7 now" in str(error.value)
    assert "attention.decode: absorb there, naive now" in str(error.value)


def test_its_tables_have_todays_names(before: Path) -> None:
    history = History(before / "run", "run")
    for read in (history.folder.read, history.table, history.newest):
        assert {"max_vio_micro", "max_vio_step", "max_vio_interval", "group_limited_fraction"} <= set(
            read("metrics/routing").columns
        )
        assert read("metrics/stability").unchanged_fraction.tolist() == [0.75]
        assert read("metrics/alerts").kind.tolist() == ["collapse"]
    assert len(history.table("metrics/routing")) == 6


def test_its_files_and_summary_have_todays_names(before: Path) -> None:
    history = History(before / "run", "run")
    assert history.info["parameters"]["total"] == 14516
    assert skipped_updates(before / "run") == [512]
    summary = history.summary
    assert summary is not None
    expected = {"questions": 4, "correct": 2, "majority_correct": 1, "z_score": 0.76}
    assert summary["questions"] == {"sisters": expected}
    assert [sample["name"] for sample in summary["samples"]] == ["completion", "infilling"]


def test_its_summary_is_shown(before: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show(RunFolder(before / "run"))
    assert "sisters" in capsys.readouterr().out


@pytest.mark.parametrize("resume", ["auto", pytest.param("checkpoint", marks=pytest.mark.slow)])
def test_it_cannot_be_resumed_and_stays_as_it_is(before: Path, resume: str) -> None:
    """The order of its rows is gone: they were shuffled within windows."""
    copied = before / f"resumed_{resume}"
    shutil.copytree(before / "run", copied)
    files = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    folder, overrides = copied, []
    if resume == "checkpoint":
        folder = before / "branch"
        overrides = [f"resume={RunFolder(copied).checkpoints()[-1]}"]
    config = todays_config(before, *overrides, f"run.dir={folder}", "trainer.max_steps=8")
    with pytest.raises(ValueError, match="shuffled rows within windows"):
        fit(config)
    assert files == {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    assert resume == "auto" or not folder.exists()
