"""An interrupted run, continued, equals an uninterrupted one bit for bit."""

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from dsv3.checkpoint.run_folder import RunFolder, load_checkpoint
from dsv3.training.resume import prepare
from tests.commands import Command, call, call_python, start
from tests.conftest import ROOT

SETTINGS = [
    "--config-dir", str(ROOT / "tests" / "conf"), "model=tiny", "data=synthetic", "tokenizer=bytes", "logger=none",
    "run.tokens=9216", "run.checkpoint_every_tokens=1536", "run.validate_every_tokens=2304",
    "balancing=v3", "precision=fp32", "benchmarks=none", "callbacks.monitor.every_tokens=768",
]  # fmt: skip


def begin(folder: Path, *more: str) -> Command:
    return start(folder.parent, "train.py", *SETTINGS, f"run.dir={folder}", *more)


def finish(folder: Path, *more: str) -> None:
    call(folder.parent, "train.py", *SETTINGS, f"run.dir={folder}", *more)


def wait_for_tokens(process: Command, folder: Path, tokens: int) -> None:
    """Until a checkpoint at or past `tokens` lies in the folder."""
    while not any(int(c.stem.split("-")[1]) >= tokens for c in RunFolder(folder).checkpoints()):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two nested containers of tensors and plain values differ."""
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [path]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return [f"{path}: {a.keys() ^ b.keys()}"]
        return [d for key in a for d in differences(a[key], b[key], f"{path}.{key}")]
    if isinstance(a, list | tuple):
        if len(a) != len(b):
            return [path]
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in differences(x, y, f"{path}[{i}]")]
    return [] if a == b else [f"{path}: {a} and {b}"]


def assert_same_run(one: Path, other: Path) -> None:
    a, b = RunFolder(one), RunFolder(other)
    assert a.checkpoints()[-1].name == b.checkpoints()[-1].name
    assert not differences(load_checkpoint(a.checkpoints()[-1]), load_checkpoint(b.checkpoints()[-1]))
    for table in sorted(f"metrics/{path.name}" for path in one.glob("metrics/*")):
        assert len(a.read(table)) > 0
        assert a.read(table).equals(b.read(table)), table


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By an interpreter of its own: hash() has another seed in the processes that are compared with it."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    call_python(folder.parent, "train.py", *SETTINGS, f"run.dir={folder}")
    return folder


def test_stopped_by_signals_then_killed_at_a_random_moment_with_a_damaged_checkpoint_and_continued(
    uninterrupted: Path, tmp_path: Path
) -> None:
    """Signals write a checkpoint. After the kill the newest one is damaged too: the one before it is taken."""
    folder = tmp_path / "stopped"
    statuses = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: 75}
    for (number, status), after in zip(statuses.items(), (1536, 3072, 4608), strict=True):
        process = begin(folder)
        wait_for_tokens(process, folder, after)
        with pytest.raises(ValueError, match="another process is training there"):
            RunFolder(folder).hold()
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == status, errors
        assert "Traceback" not in errors
        assert not (folder / "summary.json").exists()
    process = begin(folder)
    wait_for_tokens(process, folder, 6144)
    time.sleep(random.random() / 4)
    process.kill()
    process.communicate()
    newest = RunFolder(folder).checkpoints()[-1]
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    assert RunFolder(folder).newest_valid_checkpoint() == RunFolder(folder).checkpoints()[-2]
    finish(folder)
    assert_same_run(uninterrupted, folder)


def test_finished_run_is_not_repeated_and_other_settings_are_refused(uninterrupted: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    finish(uninterrupted)
    assert before == {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}
    process = begin(uninterrupted, "seed=2")
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "seed: 1 there, 2 now" in errors
    assert "Traceback" not in errors
    assert before == {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*")}


def test_a_mistake_found_while_building_leaves_no_run_behind(tmp_path: Path) -> None:
    process = begin(tmp_path / "new", "memory=ngram", "memory.orders=[1]")
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "error: memory.orders=[1]" in errors
    assert not (tmp_path / "new").exists()


def test_a_folder_in_which_nothing_was_trained_takes_other_settings(
    composed: Callable[..., DictConfig], tmp_path: Path
) -> None:
    folder = RunFolder(tmp_path)
    assert prepare(composed("seed=1"), folder) is None
    folder.release()
    assert prepare(composed("seed=2"), folder) is None
    assert OmegaConf.load(folder.config_path).seed == 2
    folder.release()
    folder.checkpoint_path(1).parent.mkdir()
    folder.checkpoint_path(1).touch()
    with pytest.raises(ValueError, match="seed: 2 there, 1 now"):
        prepare(composed("seed=1"), folder)


@pytest.mark.slow
def test_same_seed_twice_gives_the_same_files(uninterrupted: Path, tmp_path: Path) -> None:
    folders = [uninterrupted, tmp_path / "again"]
    finish(folders[1])
    parts = [sorted(path.relative_to(folder) for path in folder.glob("metrics/*/*")) for folder in folders]
    assert parts[0] == parts[1] != []
    for part in parts[0]:
        assert (folders[0] / part).read_bytes() == (folders[1] / part).read_bytes()
    assert len(RunFolder(folders[0]).read("metrics/train")) == 36


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_on_a_gpu_a_killed_run_continues_bit_for_bit(tmp_path: Path, precision: str) -> None:
    """With deterministic algorithms: attention's gradients come in any order otherwise."""
    more = ("trainer.accelerator=cuda", "+trainer.deterministic=true", f"precision={precision}")
    finish(tmp_path / "whole", *more)
    process = begin(tmp_path / "killed", *more)
    wait_for_tokens(process, tmp_path / "killed", 3072)
    process.kill()
    process.wait()
    finish(tmp_path / "killed", *more)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")
