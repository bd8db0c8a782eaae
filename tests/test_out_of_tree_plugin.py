"""Plugins that live outside the project: found by `_target_` alone, checked, and trained with."""

import json
import shutil
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch

from dsv3.checkpoint.loading import load_run
from dsv3.checkpoint.run_folder import RunFolder
from dsv3.config.known_parts import targets_in
from dsv3.contracts import Answer
from dsv3.testing import (
    Marked,
    check_callback,
    check_objective,
    check_precision,
    check_reward,
    check_router,
    check_tokenizer,
)
from tests.commands import attempt
from tests.conftest import ROOT

EXAMPLES = ROOT / "tests" / "examples"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    for example in EXAMPLES.iterdir():
        monkeypatch.syspath_prepend(str(example))


def test_the_router_keeps_to_its_contract() -> None:
    from softplus_router import SoftplusRouter

    factory = partial(SoftplusRouter, dim=32, n_experts=8, top_k=2, route_scale=1.0)
    check_router(factory, dim=32, n_experts=8, top_k=2)


def test_the_precision_keeps_to_its_contract() -> None:
    from wide_head import WideHead

    check_precision(partial(WideHead, body="bfloat16"), tolerance=0.01)
    assert WideHead(body="bfloat16").linear(2, 3, role="head")(torch.ones(1, 2)).dtype == torch.float32
    with pytest.raises(ValueError, match="body=float16"):
        WideHead(body="float16")


def test_the_objective_keeps_to_its_contract() -> None:
    from smoothed_loss import SmoothedLoss

    check_objective(partial(SmoothedLoss, smoothing=0.1))
    with pytest.raises(ValueError, match="smoothing=1"):
        SmoothedLoss(smoothing=1.0, token_bytes_V=torch.zeros(4))


def test_the_reward_keeps_to_its_contract() -> None:
    from last_line import LastLine

    row = {"answer": "25"}
    check_reward(partial(LastLine, longest=2), [Marked(row, "5 * 5 is\n25", "5 * 5 is\n26")])
    assert LastLine(longest=2)([Answer("", f"{above}25", [], True, row) for above in ("", "a\n", "a\nb\n")]) == [
        1,
        1,
        0,
    ]


def test_the_callback_keeps_to_its_contract() -> None:
    from token_counts import TokenCounts

    check_callback(partial(TokenCounts, every_tokens=32))
    with pytest.raises(ValueError, match="every_tokens=0"):
        TokenCounts(every_tokens=0)


def test_the_tokenizer_keeps_to_its_contract() -> None:
    from plain_bytes import plain_bytes

    check_tokenizer(partial(plain_bytes, vocab_size=264))
    with pytest.raises(ValueError, match="vocab_size=300"):
        plain_bytes(vocab_size=300, texts={}, cache_dir="")


def train(folder: Path, conf: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python train.py --config-dir conf ...` from another folder, where modules are found by --config-dir alone."""
    return attempt(folder, "train.py", "--config-dir", str(conf), *arguments)


@pytest.fixture
def together(tmp_path: Path) -> Path:
    """The conf/ of one folder that holds all examples."""
    for example in EXAMPLES.iterdir():
        shutil.copytree(example, tmp_path / "mine", dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "mine" / "conf"


CHOSEN = [
    "router=softplus", "precision=wide_head", "objective=smoothed", "reward=last_line", "tokenizer=plain_bytes",
    "+callbacks@callbacks.mine=mine",
]  # fmt: skip


def test_they_train_through_one_key_each(together: Path, tmp_path: Path) -> None:
    source = f"{{_target_: data.sources.local_files, path: {ROOT}/dsv3/config, text_column: text, weight: 1.0}}"
    done = train(
        tmp_path, together, f"hydra.searchpath=[file://{ROOT}/tests/conf]", *CHOSEN, "model=tiny",
        "model.vocab_size=264", "callbacks.mine.every_tokens=512", "data=small_files", f"+data.sources.code={source}",
        f"data.cache_dir={tmp_path}/cache", "logger=none", "benchmarks=none", "trainer.max_steps=5",
        f"run.dir={tmp_path}/run",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = RunFolder(tmp_path / "run")
    assert json.loads(folder.summary_path.read_text())["steps"] == 5
    steps, counts = folder.read("metrics/train"), folder.read("metrics/token_counts")
    assert (steps["loss"] != steps["nll"]).all(), "the objective that was chosen is trained on"
    assert counts["tokens"].tolist() == [512, 1024]
    assert counts["distinct"].is_monotonic_increasing
    tokenizer = load_run(tmp_path / "run", allow=targets_in(together)).tokenizer()
    assert tokenizer.encode("ab") == [8 + ord("a"), 8 + ord("b")]
    assert tokenizer.vocab_size == 264


def test_mistakes_are_found_before_any_work(together: Path, tmp_path: Path) -> None:
    mistakes = ["router.rute_scale=2", "callbacks.mine.every=2", "objective.smoothing=much", "reward.longest=0"]
    done = train(tmp_path, together, *CHOSEN, *mistakes, f"run.dir={tmp_path}/run")
    assert done.returncode == 2
    assert done.stderr.startswith("4 problems")
    for part in (*mistakes, "route_scale", "every_tokens"):
        assert part in done.stderr
    assert not (tmp_path / "run").exists()
