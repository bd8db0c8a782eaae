"""Compiled training computes what it computes without, and nothing but training is compiled."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from omegaconf import DictConfig

from dsv3.build import build_model
from dsv3.config.preflight import check
from dsv3.model.compile import compile_for_training, compile_parts
from tests.training.test_lightning_module import module_of, step_of

Compose = Callable[..., DictConfig]


def test_only_training_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: lambda x: (called.append("compiled"), f(x))[1])
    module = torch.nn.Linear(2, 2)
    compile_for_training(module)
    with torch.no_grad():
        module(torch.ones(1, 2))
    assert called == []
    module(torch.ones(1, 2))
    assert called == ["compiled"]


def test_every_block_and_norm_is_compiled(composed: Compose) -> None:
    model = build_model(composed())
    before = model.state_dict().keys()
    compile_parts(model)
    compiled = {name for name, module in model.named_modules() if "forward" in vars(module)}
    assert {
        "layers.0.mlp",
        "layers.1.mlp.router",
        "layers.1.mlp.shared_experts",
        "mtp.depths.0.block.self_attn",
    } < compiled
    assert {"norm", "layers.0.self_attn.q_a_layernorm", "layers.0.input_layernorm"} < compiled
    assert not {name for name in compiled if name.endswith(("experts.gate_up_proj", "mlp.experts", "layers.1.mlp"))}
    assert model.state_dict().keys() == before


def test_modules_in_emulated_fp8_stay_eager(composed: Compose) -> None:
    """torch.compile cannot trace their layers, and training stopped within torch."""
    model = build_model(composed("precision=fp8_blockwise"))
    compile_parts(model)
    compiled = {name for name, module in model.named_modules() if "forward" in vars(module)}
    assert not {name for name in compiled if name.endswith(("self_attn", "mlp", "shared_experts"))}
    assert {"norm", "layers.1.mlp.router"} < compiled


def test_compiling_and_recomputing_exclude_each_other() -> None:
    problems = check("train", ["compile=true", "recompute=[norm]"])
    assert [problem.key for problem in problems] == ["compile"]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("part", ["attention=mla", "attention=gqa", "precision=fp8_blockwise"])
def test_a_compiled_step_is_that_of_the_eager_model(composed: Compose, part: str) -> None:
    config = composed("precision=fp32", part)
    step, results = step_of(config), []
    for compiled in (False, True):
        module = module_of(config)
        if compiled:
            compile_parts(module.model)
        record = module.take_step(step)
        results.append((record, [p.grad for p in module.model.parameters()]))
    (plain, gradients), (fast, others) = results
    assert fast.loss == pytest.approx(plain.loss, rel=1e-6)
    assert all(np.array_equal(load, fast.loads[name]) for name, load in plain.loads.items())
    for one, other in zip(gradients, others, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)
