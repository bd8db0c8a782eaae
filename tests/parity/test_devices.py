"""Training and decoding on a device against the CPU: `pytest -m gpu` runs them on a GPU, the rest on the CPU itself."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from dsv3.build import build_data, build_model
from dsv3.contracts import Step
from dsv3.inference.generation import generate
from dsv3.inference.sampling import Settings
from dsv3.training.run import build_run
from dsv3.training.step import Losses, take_gradients
from plugins.objective.pretraining import Pretraining

Compose = Callable[..., DictConfig]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]
PARTS = [
    [],
    ["attention=gqa", "router=softmax", "balancing=switch_aux"],
    ["data.isolate_documents=true", "mtp=none", "experts=loop"],
    ["memory=ngram", "memory.rows=512"],
]


def gradients(config: DictConfig, device: str) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients, on the CPU, of one step on the device."""
    step = next(iter(build_data(config).train_dataloader()))
    moved = [micro.map(lambda tensor: tensor.to(device)) for micro in step.micro_batches]
    model = build_model(config).to(device)
    objective = Pretraining(token_bytes_V=torch.ones(config.model.vocab_size, dtype=torch.int64)).to(device)
    sums = take_gradients(Losses(model, objective), Step(moved, 0, {})).over_ranks()
    loss = float(sums.scalars["nll"] / sums.scalars["targets"])
    found = {name: p.grad.to_dense().cpu() for name, p in model.named_parameters() if p.grad is not None}
    return loss, found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("parts", PARTS, ids=lambda parts: " ".join(parts) or "default")
def test_a_step_in_fp32_has_the_gradients_of_the_cpu(composed: Compose, device: str, parts: list[str]) -> None:
    """FP32 in full: torch's default leaves TF32 off for products."""
    config = composed("precision=fp32", "dispatch.pad_multiple=1", *parts)
    (loss, ours), (expected, theirs) = gradients(config, device), gradients(config, "cpu")
    assert loss == pytest.approx(expected, rel=1e-5)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("precision", ["bf16", "fp8_blockwise"])
def test_a_run_trains_on_the_device(composed: Compose, tmp_path: Path, device: str, precision: str) -> None:
    keys = ("trainer.max_steps=4", "dispatch.pad_multiple=1", f"precision={precision}")
    losses = {}
    for name in (device, "cpu"):
        run = build_run(composed(f"run.dir={tmp_path}/{name}", f"trainer.accelerator={name}", *keys))
        run.trainer.fit(run.module, run.data, weights_only=True)
        losses[name] = run.folder.read("metrics/train").loss
        run.folder.release()
    assert losses[device].tolist() == pytest.approx(losses["cpu"].tolist(), rel=0.02)


@pytest.mark.parametrize("device", DEVICES)
def test_greedy_text_is_that_of_the_cpu(composed: Compose, device: str) -> None:
    model = build_model(composed("precision=fp32", "dispatch.pad_multiple=1")).eval()
    settings = Settings(max_tokens=12)
    expected = list(generate(model, [97, 98, 99], settings))
    assert list(generate(model.to(device), [97, 98, 99], settings)) == expected
