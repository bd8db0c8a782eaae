"""A plugin that lives outside the project: found by `_target_` alone, checked, and trained with."""

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from dsv3.testing import check_router
from tests.conftest import ROOT

EXAMPLE = ROOT / "tests" / "examples" / "softplus_router"


def test_it_keeps_to_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from softplus_router import SoftplusRouter

    factory = partial(SoftplusRouter, dim=32, n_experts=8, top_k=2, route_scale=1.0)
    check_router(factory, dim=32, n_experts=8, top_k=2)


def train(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "train.py"), "--config-dir", str(EXAMPLE / "conf"), *arguments]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{EXAMPLE}"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def test_it_trains_through_one_key(tmp_path: Path) -> None:
    searchpath = f"hydra.searchpath=[file://{ROOT}/tests/conf]"
    done = train(
        tmp_path, searchpath, "router=softplus", "model=tiny", "data=synthetic", "tokenizer=bytes", "logger=none",
        "trainer.max_steps=5", "benchmarks=none", f"run.dir={tmp_path}/run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 5


def test_its_mistakes_are_found_before_any_work(tmp_path: Path) -> None:
    done = train(tmp_path, "router=softplus", "router.rute_scale=2", f"run.dir={tmp_path}/run")
    assert done.returncode == 2
    assert "router.rute_scale=2" in done.stderr
    assert "route_scale" in done.stderr
    assert not (tmp_path / "run").exists()
