"""A plugin that lives outside the project: found by `_target_` alone, checked, and trained with."""

import json
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch

from dsv3.testing import check_precision, check_router
from tests.commands import attempt
from tests.conftest import ROOT

EXAMPLE = ROOT / "tests" / "examples" / "softplus_router"
PRECISION = ROOT / "tests" / "examples" / "wide_head"


def test_it_keeps_to_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    from softplus_router import SoftplusRouter

    factory = partial(SoftplusRouter, dim=32, n_experts=8, top_k=2, route_scale=1.0)
    check_router(factory, dim=32, n_experts=8, top_k=2)


def test_the_precision_keeps_to_its_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(PRECISION))
    from wide_head import WideHead

    check_precision(partial(WideHead, body="bfloat16"), tolerance=0.01)
    assert WideHead(body="bfloat16").linear(2, 3, role="head")(torch.ones(1, 2)).dtype == torch.float32
    with pytest.raises(ValueError, match="body=float16"):
        WideHead(body="float16")


def train(folder: Path, *arguments: str, example: Path = EXAMPLE) -> subprocess.CompletedProcess[str]:
    return attempt(folder, "train.py", "--config-dir", str(example / "conf"), *arguments, path=[example])


@pytest.mark.parametrize(("example", "key"), [(EXAMPLE, "router=softplus"), (PRECISION, "precision=wide_head")])
def test_it_trains_through_one_key(example: Path, key: str, tmp_path: Path) -> None:
    searchpath = f"hydra.searchpath=[file://{ROOT}/tests/conf]"
    done = train(
        tmp_path, searchpath, key, "model=tiny", "data=synthetic", "tokenizer=bytes", "logger=none",
        "trainer.max_steps=5", "benchmarks=none", f"run.dir={tmp_path}/run",
        example=example,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["steps"] == 5


def test_its_mistakes_are_found_before_any_work(tmp_path: Path) -> None:
    done = train(tmp_path, "router=softplus", "router.rute_scale=2", f"run.dir={tmp_path}/run")
    assert done.returncode == 2
    assert "router.rute_scale=2" in done.stderr
    assert "route_scale" in done.stderr
    assert not (tmp_path / "run").exists()
