"""The number format that the machine multiplies faster: chosen by a probe, written down, kept."""

import logging
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from dsv3.contracts import Settles
from dsv3.training.run import build_run
from hydra_plugins import study_sweeper
from plugins.precision import auto
from plugins.precision.auto import Auto, Rates

Compose = Callable[..., DictConfig]
CPU = torch.device("cpu")
SLOW, FAST = Rates(bf16=167e9, fp32=310e9), Rates(bf16=430e9, fp32=170e9)


@pytest.mark.parametrize(
    ("rates", "choice"), [(SLOW, "fp32"), (FAST, "bf16"), (Rates(0.81, 1.0), "bf16"), (Rates(0.79, 1.0), "fp32")]
)
def test_fp32_only_where_bf16_is_slower(monkeypatch: pytest.MonkeyPatch, rates: Rates, choice: str) -> None:
    monkeypatch.setattr(auto, "probe", lambda: rates)
    chooser = Auto(choice=None)
    assert isinstance(chooser, Settles)
    values, why = chooser.settle(CPU)
    assert values == {"choice": choice}
    assert why.startswith(choice.upper())
    assert Auto(choice=choice).activation_dtype == getattr(torch, {"bf16": "bfloat16", "fp32": "float32"}[choice])


def test_a_gpu_is_not_probed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "probe", lambda: SLOW)
    assert Auto(choice=None).settle(torch.device("cuda"))[0] == {"choice": "bf16"}


def test_the_probe_times_both_products() -> None:
    rates = auto.probe()
    assert rates.bf16 > 1e8
    assert rates.fp32 > 1e8


def test_another_choice_is_refused() -> None:
    with pytest.raises(ValueError, match=r"precision\.choice=fp16: must be bf16, fp32 or null"):
        Auto(choice="fp16")  # type: ignore[arg-type]


def test_a_run_writes_it_down_and_a_resumed_one_keeps_it(
    composed: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(auto, "probe", lambda: SLOW)
    keys = (f"run.dir={tmp_path}/run", "precision=auto", "run.checkpoint_every_tokens=512")
    with caplog.at_level(logging.INFO):
        first = build_run(composed(*keys, "trainer.max_steps=2"))
    assert "FP32: BF16 GEMM at 167 GFLOP/s, FP32 at 310" in caplog.text
    first.trainer.fit(first.module, first.data)
    first.folder.release()
    assert OmegaConf.load(first.folder.config_path).precision.choice == "fp32"
    monkeypatch.setattr(auto, "probe", lambda: FAST)
    again = build_run(composed(*keys, "trainer.max_steps=3"))
    again.folder.release()
    assert again.config.precision.choice == "fp32"
    assert again.module.model.precision.activation_dtype == torch.float32
    anew = build_run(composed(*keys, "trainer.max_steps=3", "resume=never"))
    anew.folder.release()
    assert anew.config.precision.choice == "bf16", "a run that starts over is probed again"


def test_every_job_of_a_sweep_has_the_choice_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "probe", lambda: SLOW)
    study_sweeper._probed.cache_clear()
    choices = {"precision": "auto"}
    config: Any = SimpleNamespace(
        trainer=SimpleNamespace(accelerator="cpu"), hydra=SimpleNamespace(runtime=SimpleNamespace(choices=choices))
    )
    jobs = {
        ("seed=1",): ["seed=1", "precision.choice=fp32"],
        ("precision=fp8_blockwise", "seed=1"): ["precision=fp8_blockwise", "seed=1"],
        ("precision=fp32", "precision=auto"): ["precision=fp32", "precision=auto", "precision.choice=fp32"],
        ("precision.choice=bf16",): ["precision.choice=bf16"],
    }
    assert {job: study_sweeper.settled(list(job), config) for job in jobs} == jobs
    study_sweeper._probed.cache_clear()
