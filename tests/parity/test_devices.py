"""Training and decoding on a device against the CPU: `pytest -m gpu` runs them on a GPU, the rest on the CPU itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from omegaconf import DictConfig

from dsv3.bench.gpu_check import unusable
from dsv3.build import build_data, build_model
from dsv3.contracts import Step
from dsv3.inference.generation import generate
from dsv3.inference.sampling import Settings
from dsv3.model.decoder import Decoder
from dsv3.training.callbacks.ema import EMA
from dsv3.training.callbacks.phases import find
from dsv3.training.run import Run, build_run
from dsv3.training.step import Losses, take_gradients
from plugins.objective.pretraining import Pretraining
from tests.parity.test_decoder import SHAPES
from tests.parity.test_models import OPTIONS
from tests.parity.twins import (
    configured,
    distance,
    gradients_by_their_names,
    load_twin,
    micro_batch,
    our_loss,
    random_model,
    their_gradients,
    write_twin,
)

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
        assert (ours[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name


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


def twins(options: tuple[str, ...], folder: Path, device: str, dtype: torch.dtype) -> tuple[Decoder, Any]:
    """A model of ours and transformers' on the device, with the same weights."""
    precision = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    dense = {"n_dense_layers": 2, "n_routed_experts": 0, "n_shared_experts": 0}
    config = configured(*options, f"precision={precision}", **SHAPES | (dense if "attention=gqa" in options else {}))
    model = random_model(config, seed=3)
    write_twin(config, model, folder, mtp=False)
    return model.to(device), load_twin(folder).to(device, dtype)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", OPTIONS)
def test_transformers_computes_the_same_there(device: str, dtype: torch.dtype, family: str, tmp_path: Path) -> None:
    """Logits, loss and gradients; in BF16 within its rounding, where a router may also turn a tie over."""
    model, twin = twins(OPTIONS[family], tmp_path, device, dtype)
    tokens_BT = torch.randint(50, (2, 24), generator=torch.Generator().manual_seed(1))
    batch = micro_batch(tokens_BT, tokens_BT.roll(-1, 1)).map(lambda tensor: tensor.to(device))
    loss, logits_BTV = our_loss(model, batch)
    loss.backward()
    theirs_BTV = twin(input_ids=batch.tokens_BT).logits
    their_loss = F.cross_entropy(theirs_BTV.flatten(0, 1).float(), batch.targets_BT.flatten())
    their_loss.backward()
    if dtype == torch.float32:
        assert distance(logits_BTV, theirs_BTV) <= 1e-5
        for name, gradient in gradients_by_their_names(model, len(model.layers)).items():
            assert distance(gradient, their_gradients(twin)[name], noise=1e-6) <= 1e-4, name
        return
    differences_BT = (logits_BTV.float() - theirs_BTV.float()).abs().amax(-1) / theirs_BTV.abs().max()
    assert differences_BT.median() <= 0.03
    assert loss.item() == pytest.approx(their_loss.item(), rel=0.03)


def trained(composed: Compose, folder: Path, *overrides: str) -> Run:
    run = build_run(composed(f"run.dir={folder}", "trainer.max_steps=4", *overrides))
    run.trainer.fit(run.module, run.data, weights_only=True)
    run.folder.release()
    return run


@pytest.mark.parametrize("device", DEVICES)
def test_averaged_weights_are_those_of_the_cpu(composed: Compose, tmp_path: Path, device: str) -> None:
    """From a GPU they are copied without waiting, and averaged a step later."""
    runs = [
        trained(composed, tmp_path / number, "precision=fp32", f"trainer.accelerator={name}", "callbacks.ema.decay=0.5")
        for number, name in (("one", device), ("other", "cpu"))
    ]
    ours, theirs = (find(run.trainer, EMA).weights for run in runs)  # type: ignore[union-attr]
    assert ours.keys() == theirs.keys()
    for name, average in theirs.items():
        assert ours[name].device.type == "cpu"
        torch.testing.assert_close(ours[name], average, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.gpu
@needs_gpu
def test_compiled_parts_train_as_eager_ones(composed: Compose, tmp_path: Path) -> None:
    losses = [
        trained(composed, tmp_path / compiled, "precision=bf16", "trainer.accelerator=cuda", f"compile={compiled}")
        .folder.read("metrics/train")
        .loss
        for compiled in ("true", "false")
    ]
    assert losses[0].tolist() == pytest.approx(losses[1].tolist(), rel=0.01)


@pytest.mark.gpu
@needs_gpu
def test_checkpoints_pass_between_precisions(composed: Compose, tmp_path: Path) -> None:
    """Each run goes on from the weights of the one before; the loss goes on too."""
    names = ["bf16", "fp8_blockwise", "fp8_te", "fp8_gpu", "bf16"]
    usable = [name for name in names if not unusable(name, torch.device("cuda"))]
    before: Run | None = None
    for number, name in enumerate(usable):
        start = [f"run.init_from={before.folder.path}"] if before is not None else []
        shapes = ["model.dim=128", "model.inter_dim=128", "model.moe_inter_dim=128", "trainer.accelerator=cuda"]
        run = trained(composed, tmp_path / str(number), f"precision={name}", *shapes, *start)
        losses = run.folder.read("metrics/train").loss
        if before is not None:
            assert losses.iloc[0] < before.folder.read("metrics/train").loss.iloc[0]
        before = run


@pytest.mark.parametrize("device", DEVICES)
def test_greedy_text_is_that_of_the_cpu(composed: Compose, device: str) -> None:
    model = build_model(composed("precision=fp32", "dispatch.pad_multiple=1")).eval()
    settings = Settings(max_tokens=12)
    expected = list(generate(model, [97, 98, 99], settings))
    assert list(generate(model.to(device), [97, 98, 99], settings)) == expected
