"""`python -m dsv3 plan`: what it prints, what it returns, and how it takes mistakes."""

import contextlib
import io
import json
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from dsv3.cli import main
from dsv3.contracts import Precision
from tests.planning.models import CONF, PRESETS


@pytest.fixture(scope="module")
def plan() -> Any:
    """plan(*arguments): the JSON that the tool prints; with the same arguments it runs once."""

    @cache
    def printed(*arguments: str) -> str:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            assert main(["plan", "format=json", *arguments]) == 0
        return out.getvalue()

    return lambda *arguments: json.loads(printed(*arguments))


def test_text_of_671b(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "model=v3_671b"]) == 0
    text = capsys.readouterr().out
    for figure in ("671.03B", "671,026,419,200", "37.55B", "37,552,282,624", "11,610,068,224", "70,272", "2,664,000"):
        assert figure in text
    assert "…" not in text, "no figure is cut off"


def test_671b_beside_the_published_hours(plan: Any) -> None:
    """MFU by hand: 260.64 GFLOPs per token with MTP, 250.45 without, 14.8T tokens, 2664K hours."""
    found = plan("model=v3_671b")
    published, seconds = found["published"], 2_664_000 * 3600
    for peak, speed in (("peak", 989.4e12), ("peak_fp8", 1978.9e12)):
        for part, flops in (("model", 250_449_887_232), ("total", 260_641_652_736)):
            assert published["implied_mfu"][peak][part] == pytest.approx(flops * 14.8e12 / (seconds * speed))
    hours = 260_641_652_736 * 14.8e12 / (0.4 * 989.4e12) / 3600
    assert published["our_gpu_hours"] == found["duration"]["gpu_hours"] == pytest.approx(hours)
    assert found["recipe"]["tokens_per_step"] == 15360 * 4096
    steps = 14.8e12 / (15360 * 4096)
    assert found["duration"]["seconds_per_step"] * steps == pytest.approx(hours / 2048 * 3600)


def test_traffic_of_a_training_is_that_of_its_layers_both_ways(plan: Any) -> None:
    """58 layers and MTP's; forward and backward; 4 nodes; 7168 numbers of one byte out and two back."""
    traffic = plan("model=v3_671b")["all_to_all"]
    assert traffic["limited"]["training_bytes_at_most"] == (58 + 1) * 2 * 4 * 7168 * 3
    assert traffic["unlimited"]["training_bytes_at_most"] == 2 * traffic["limited"]["training_bytes_at_most"]


def test_the_mfu_of_the_published_hours_gives_them_back(plan: Any) -> None:
    mfu = plan("model=v3_671b")["published"]["implied_mfu"]["peak"]["total"]
    assert plan("model=v3_671b", f"mfu={mfu}")["duration"]["gpu_hours"] == pytest.approx(2_664_000)
    known = plan("model=v3_671b", "tokens=1e12", "gpu_hours=180e3")["duration"]["implied_mfu"]["peak"]["total"]
    assert known == pytest.approx(mfu)


def test_another_model_than_the_published_is_not_set_beside_it(plan: Any) -> None:
    assert "published" not in plan("model=v3_671b", "attention=gqa")
    assert "published" in plan("model=v3_671b", "mtp=none")


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_planned(preset: str, plan: Any) -> None:
    found = plan(f"model={preset}")
    assert found["model"] == preset
    assert set(found["cache_per_token"]) >= {"mla", "gqa"}
    assert found["memory_per_gpu"]["total"] > 0


def test_what_is_given_is_planned_for(plan: Any) -> None:
    arguments = ("gpus=16", "pp=2", "ep=4", "zero_stage=0", "pipeline=dualpipe", "recompute=full", "num_microbatches=8")
    recipe = plan("model=v2_lite", *arguments, "formats=fp8", "bytes={moment: 4}", "times={overlapped: 2.5}")["recipe"]
    expected = {"gpus": 16, "pp": 2, "dp": 8, "ep": 4, "zero_stage": 0, "pipeline": "dualpipe", "recompute": "full"}
    assert expected.items() <= recipe.items()
    assert (recipe["formats"]["weight"], recipe["formats"]["moment"]) == (1, 4)
    assert recipe["times"] == {"forward": 1, "backward": 2, "weight": 1, "overlapped": 2.5}


def test_the_training_config_is_the_default(plan: Any) -> None:
    recipe = plan("model=tiny", "run.tokens=123456", "data.sequence_length=64", "data.micro_batch_size=4")["recipe"]
    assert (recipe["tokens"], recipe["seq_len"], recipe["micro_batch"], recipe["gpus"]) == (123456, 64, 4, 1)


class Windowed(nn.Module):
    """An attention that planning has never heard of: it sees the last `window` positions and keeps only those."""

    def __init__(self, *, dim: int, window: int, precision: Precision) -> None:
        super().__init__()
        self.qkv = precision.linear(dim, 3 * dim, role="attention_up")
        self.out = precision.linear(dim, dim, role="attention_out")
        self.decay = nn.Parameter(Tensor(dim))
        self.dim, self.window = dim, window

    def new_cache(self, rows: Iterable[int] = ()) -> None:
        return None

    def kv_cache_elements_per_token(self) -> int:
        return 2 * self.dim

    def flops_per_token(self, context: int) -> int:
        return 8 * self.dim**2 + 4 * self.dim * min(context, self.window)


def test_a_strangers_attention_is_planned(plan: Any, tmp_path: Path) -> None:
    (tmp_path / "attention").mkdir()
    yaml = f"_target_: {__name__}.Windowed\n_partial_: true\ndim: ${{model.dim}}\nwindow: 10\n"
    (tmp_path / "attention" / "windowed.yaml").write_text(yaml)
    found = plan(f"hydra.searchpath=[file://{tmp_path}]", "attention=windowed", "model=tiny", "seq_len=100")
    assert found["parameters"]["attention"]["total"] == 3 * (4 * 64 * 64 + 64)
    assert found["flops_per_token"]["training"]["attention scores"] == 3 * 3 * 4 * 64 * 10
    assert found["cache_per_token"].keys() == {"windowed", "mla", "gqa"}
    assert found["cache_per_token"]["windowed"]["bytes"] == 3 * 2 * 64 * 2


@pytest.mark.parametrize(
    ("arguments", "status", "messages"),
    [
        (["bytes={momen: 2}"], 2, ["bytes.momen=2.0", "moment"]),
        (["times={fast: 2}"], 2, ["times.fast=2.0", "overlapped"]),
        (["gpus=6", "pp=4"], 2, ["pp=4: must divide gpus=6"]),
        (["pipeline=zb2p"], 2, ["pipeline=zb2p", "zb1p"]),
        (["gpu=6", "model=tinny"], 2, ["gpu=6", "gpus", "model=tinny", "tiny"]),
    ],
)
def test_mistakes_are_named(
    arguments: list[str], status: int, messages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        sys.exit(main(["plan", *arguments]))
    assert ended.value.code == status
    told = capsys.readouterr().err
    assert all(message in told for message in messages), told


def test_the_documented_output_is_the_real_one(capsys: pytest.CaptureFixture[str]) -> None:
    document = (CONF.parent / "docs" / "plan.md").read_text()
    assert main(["plan", "model=v3_671b"]) == 0
    printed = "\n".join(line.rstrip() for line in capsys.readouterr().out.splitlines())
    assert f"$ python -m dsv3 plan model=v3_671b\n{printed}\n```" in document
