"""environment.json: there before the first step, complete, without secrets; `python -m dsv3 env` prints the same."""

import json
import os
import signal
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning
import pytest
from omegaconf import OmegaConf

from dsv3.checkpoint.run_folder import RunFolder
from dsv3.cli import main
from dsv3.reporting.amounts import text_of_seconds
from dsv3.training import provenance
from dsv3.training.callbacks.record import Record
from tests.commands import start
from tests.smoke.test_resume import SETTINGS


class KilledAtFirstStep(lightning.Callback):
    def on_train_batch_start(self, *arguments: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def test_it_is_there_after_a_kill_at_the_first_step(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    killer = "+callbacks.killed={_target_: tests.training.test_provenance.KilledAtFirstStep}"
    process = start(tmp_path, "train.py", *SETTINGS, f"run.dir={folder}", killer)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    assert errors.startswith("device: cpu ("), "the first line"
    found = json.loads((folder / "environment.json").read_text())
    assert found["command"][2:] == [*SETTINGS, f"run.dir={folder}", killer]
    assert found["device"] == "cpu"
    assert found["precision"] == {"_target_": "plugins.precision.plain.FP32"}
    assert found["packages"]["torch"] == version("torch")
    assert found["threads"]["torch"] >= 1
    assert {"model", "count", "usable", "memory_bytes"} == set(found["cpu"])
    assert set(found["code"] or {"commit", "changed", "new"}) == {"commit", "changed", "new"}
    assert (folder / "environment.diff").exists() == bool(found["code"] and found["code"]["changed"])


def test_the_environment_of_before_is_kept_where_it_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, config = RunFolder(tmp_path), OmegaConf.create({"precision": {}, "trainer": {"accelerator": "cpu"}})

    def begin(tokens: int, changes: bytes = b"", **found: Any) -> list[str]:
        monkeypatch.setattr(provenance, "diff", lambda: changes)
        monkeypatch.setattr(provenance, "provenance", lambda: {"command": [str(tokens)], **found})
        provenance.write_provenance(folder, config, tokens=tokens)
        return sorted(path.name for path in tmp_path.iterdir())

    assert begin(0, b"+x", cuda=1) == ["environment.diff", "environment.json"]
    assert begin(512, b"+x", cuda=1) == ["environment.diff", "environment.json"], "the same but for its command line"
    assert begin(1024, b"", cuda=1) == [
        "environment-until-000000000001024.diff",
        "environment-until-000000000001024.json",
        "environment.json",
    ]
    (tmp_path / "environment.json").write_text("{cut")
    assert "environment-until-000000000002048.json" in begin(2048, cuda=2)
    assert json.loads((tmp_path / "environment.json").read_text())["cuda"] == 2


def test_a_very_long_diff_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "git", lambda *arguments: b"x" * 20_000_000)
    changes = provenance.diff.__wrapped__()
    assert len(changes) < 10_000_100
    assert changes.endswith(b"\n(cut: 20,000,000 bytes in all)\n")


def test_code_without_a_repository_has_no_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.code.__wrapped__() is None
    assert provenance.diff.__wrapped__() == b""


def test_env_prints_it_without_secrets(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "do-not-show")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert main(["env", "format=json"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["packages"]["lightning"] == version("lightning")
    assert f"  torch=={version('torch')}\n" in said.err
    assert "threads  " in said.err
    assert "do-not-show" not in said.out + said.err


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (99.4, "99 s"), (100, "2 min"), (5900, "98 min"), (11_100, "3 h 05 min"), (200_000, "2 d 08 h")],
)
def test_times_are_short(seconds: float, text: str) -> None:
    assert text_of_seconds(seconds) == text


def test_time_left_counts_pauses_and_stops_at_the_cap(monkeypatch: pytest.MonkeyPatch) -> None:
    record, clock = Record(), iter([10.0, 20.0, 50.0])
    monkeypatch.setattr("dsv3.training.callbacks.record.time.perf_counter", lambda: next(clock))
    step: Any = type("Step", (), {"tokens_before": 0, "tokens": 100, "step": 1})
    module: Any = type("Module", (), {"record": step, "total_tokens": 1000, "max_steps": -1})
    record.started = 4.0
    assert record._estimated_left(module) == 9 * 6, "the pace of the first step, which was 6 seconds long"
    step.tokens_before, step.tokens, step.step = 100, 200, 2
    assert record._estimated_left(module) == 8 * 10
    step.tokens_before, step.tokens, step.step, module.max_steps = 200, 300, 3, 5
    assert record._estimated_left(module) == 2 * 20, "100 tokens in 20 s; two steps are left"
