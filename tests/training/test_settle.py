"""The first line of a run: device, threads and numeric format, each with its reason; mps is refused by name."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from dsv3.checkpoint.run_folder import RunFolder
from dsv3.cli import main
from dsv3.config.preflight import check
from dsv3.inference import engines
from dsv3.runtime import device_named
from dsv3.training.settle import settled

Compose = Callable[..., DictConfig]


def first_line(config: DictConfig, folder: Path, caplog: pytest.LogCaptureFixture) -> str:
    caplog.clear()
    with caplog.at_level(logging.INFO):
        settled(config, RunFolder(folder))
    (line,) = caplog.messages
    return line


def test_the_first_line_gives_device_threads_and_format_with_their_reasons(
    composed: Compose, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
    line = first_line(composed(), tmp_path, caplog)
    assert line == "device: cpu (torch sees no GPU); threads: 1 (OMP_NUM_THREADS=1); precision: BF16 (configured)"
    monkeypatch.delenv("OMP_NUM_THREADS")
    line = first_line(composed("trainer.accelerator=cpu", "precision=auto"), tmp_path, caplog)
    assert line.startswith("device: cpu (trainer.accelerator=cpu); threads: 1 (of ")
    assert "GFLOP/s" in line
    kept = {"_target_": "plugins.precision.auto.Auto", "choice": "fp32"}
    OmegaConf.save({"precision": kept}, tmp_path / "config.yaml")
    line = first_line(composed("precision=auto"), tmp_path, caplog)
    assert line.endswith("precision: fp32 (chosen when the run began: config.yaml)")


def test_it_is_first_where_there_is_more_to_say(
    composed: Compose, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engines._say.cache_clear()
    with caplog.at_level(logging.INFO):
        settled(composed("router=hash"), RunFolder(tmp_path))
    first, second = caplog.messages
    assert first.startswith("device: cpu ")
    assert second.startswith("text is decoded by engine=eager, without an ONNX graph: router.")


def test_a_gpu_is_named(
    composed: Compose, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    assert first_line(composed(), tmp_path, caplog).startswith("device: cuda NVIDIA H100 (torch sees a GPU); threads: ")


def test_mps_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    (problem,) = check("train", ["trainer.accelerator=mps"])
    assert str(problem) == "trainer.accelerator=mps: must be one of auto, cpu, cuda; nobody has tested mps yet"
    assert main(["generate", "checkpoint=x", "device=mps"]) == 2
    assert "device=mps: must be one of auto, cpu, cuda; nobody has tested mps yet" in capsys.readouterr().err
    with pytest.raises(ValueError, match="device=mps: must be auto, cpu or cuda; nobody has tested mps yet"):
        device_named("mps")
