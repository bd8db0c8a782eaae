"""`profile=true` writes a trace of some steps and the most expensive operations, and changes nothing else."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from omegaconf import DictConfig

from dsv3.checkpoint.run_folder import RunFolder
from dsv3.training.callbacks.profiling import Profiling
from dsv3.training.fit import fit
from dsv3.training.lightning_module import LanguageModel

Compose = Callable[..., DictConfig]


@pytest.mark.slow
def test_a_trace_and_the_ten_most_expensive_operations(composed: Compose, tmp_path: Path) -> None:
    """Of the last of three steps: a trace that the end of training cuts short is written too."""
    keys = ("trainer.max_steps=3", "callbacks.monitor=null", "run.validate_every_tokens=100000")
    traced = ("profile=true", "callbacks.profiling.skip_steps=2", "callbacks.profiling.steps=2")
    runs = [fit(composed(*keys, *more, f"run.dir={tmp_path}/{len(more)}")) for more in ((), traced)]
    for run in runs:
        run.folder.release()
    plain, profiled = (run.folder.read("metrics/train") for run in runs)
    assert plain.equals(profiled)
    assert not (runs[0].folder.path / "profile").exists()
    folder = runs[1].folder.path / "profile"
    with gzip.open(folder / "trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert sum(name.startswith("Optimizer.step#") for name in names) == 1
    assert "aten::mm" in names
    lines = (folder / "operations.txt").read_text().splitlines()
    rows = lines[3 : lines.index(lines[0], 3)]
    assert len(rows) == 10


def test_a_run_that_ends_too_early_says_so(caplog: pytest.LogCaptureFixture) -> None:
    for enabled in (False, True):
        assert not caplog.messages
        callback, module = Profiling(enabled=enabled, skip_steps=3, steps=3), cast(LanguageModel, SimpleNamespace())
        module.folder = cast(RunFolder, SimpleNamespace(writes=True))
        callback.on_train_batch_start(None, module, None, 0)  # type: ignore[arg-type]
        callback.on_train_end(None, module)  # type: ignore[arg-type]
    assert caplog.messages == ["profile=true: training ended within callbacks.profiling.skip_steps=3"]
