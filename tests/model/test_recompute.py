"""Recomputation gives the same numbers to the bit, and lets go of what it says."""

from collections.abc import Callable
from functools import cache
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from dsv3.build import build_model
from dsv3.config.declared import Train
from dsv3.model.layers import RMSNorm
from dsv3.model.recompute import Part, recomputed, recomputing
from dsv3.training.step import StepRecord
from tests.training.test_lightning_module import module_of, step_of

Compose = Callable[..., DictConfig]
PARTS = get_args(Part)


def test_preflight_knows_the_parts() -> None:
    (parts,) = get_args(get_type_hints(Train)["recompute"])
    assert get_args(parts) == PARTS


@pytest.fixture(scope="module")
def stepped(composed: Compose) -> Callable[[str, str], tuple[StepRecord, list[Tensor | None]]]:
    """stepped(swap, parts): a step with these parts recomputed, and its gradients; each is taken once."""

    @cache
    def step(swap: str, parts: str) -> tuple[StepRecord, list[Tensor | None]]:
        config = composed(swap, f"recompute=[{parts}]")
        module = module_of(config)
        module.recompute = config.recompute
        record = module.take_step(step_of(config))
        return record, [p.grad for p in module.model.parameters()]

    return step


@pytest.mark.parametrize("swap", ["precision=bf16", "precision=fp32", "precision=fp8_blockwise", "attention=gqa"])
@pytest.mark.parametrize("part", [*PARTS, "all"])
def test_a_step_is_the_same_to_the_bit(
    stepped: Callable[[str, str], tuple[StepRecord, list[Tensor | None]]], part: str, swap: str
) -> None:
    """Losses, loads and every gradient, over two micro-batches with MTP."""
    plain, gradients = stepped(swap, "")
    again, others = stepped(swap, ",".join(PARTS) if part == "all" else part)
    assert plain.loss == again.loss
    assert all(np.array_equal(counts, again.loads[name]) for name, counts in plain.loads.items())
    for one, other in zip(gradients, others, strict=True):
        assert one is not None
        assert torch.equal(one, other)


def results_alive(model: nn.Module, batch: Any, parts: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """By part: which of its results are still held after a forward pass whose loss alone is kept."""
    held: dict[str, list[StorageWeakRef]] = {part: [] for part in PARTS}

    def note(part: str, *tensors: Tensor) -> None:
        held[part] += [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors]

    def attended(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> Tensor:
        note("attention_up", q, k, v)
        return causal_attention(q, k, v, **rest)

    from plugins.attention import mla
    from plugins.attention.causal import causal_attention

    monkeypatch.setattr(mla, "causal_attention", attended)
    hooks = []
    for name, module in model.named_modules():
        if isinstance(module, RMSNorm):
            hooks.append(module.register_forward_hook(lambda _m, _i, y: note("norm", y)))
        elif name.endswith("down_proj"):
            hooks.append(module.register_forward_pre_hook(lambda _m, inputs: note("swiglu", inputs[0])))
    with recomputing(parts):
        output = model(batch, with_mtp=True)
        loss = output.hidden_BTD.float().square().sum() + output.predictions[0].hidden_BSD.float().square().sum()
        del output
    for hook in hooks:
        hook.remove()
    alive = {part: [not ref.expired() for ref in refs] for part, refs in held.items()}
    loss.backward()
    return alive


@pytest.mark.parametrize("recomputed_part", PARTS)
def test_results_are_let_go(composed: Compose, recomputed_part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = composed("precision=bf16")
    model, batch = build_model(config), step_of(config).micro_batches[0]
    plain, alive = (results_alive(model, batch, parts, monkeypatch) for parts in ([], [recomputed_part]))
    assert all(map(any, plain.values()))
    for part, results in alive.items():
        assert not any(results) if part == recomputed_part else results == plain[part], part


def doubled_sum(x: Tensor, calls: list[int]) -> Tensor:
    def function(x: Tensor) -> Tensor:
        calls.append(1)
        return 2 * x

    y = recomputed("norm", function, x)
    return (y.view(-1) * y.view(-1)).sum() + y.pow(3).sum()


def test_a_function_runs_once_more_for_all_its_uses_and_again_for_a_second_backward_pass() -> None:
    x, calls = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), list[int]()
    with recomputing(["norm"]):
        loss = doubled_sum(x, calls)
    assert len(calls) == 1
    loss.backward(retain_graph=True)
    assert len(calls) == 2
    expected = 8 * x + 24 * x.square()
    torch.testing.assert_close(x.grad, expected.detach())
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * expected.detach())


def test_results_of_results_and_other_parts() -> None:
    x, calls = torch.randn(5, dtype=torch.float64, requires_grad=True), list[str]()

    def named(name: str, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda t: (calls.append(name), function(t))[1]

    with recomputing(["norm", "swiglu"]):
        first = recomputed("norm", named("first", torch.sin), x)
        second = recomputed("swiglu", named("second", torch.exp), first)
        other = recomputed("attention_up", named("other", torch.cos), first)
        loss = (second * second).sum() + (other * other).sum()
        del first, second, other
    calls.clear()
    loss.backward()
    assert sorted(calls) == ["first", "second"], "a part that was not asked for is not run again"
    s, c = x.sin(), x.cos()
    expected = 2 * (2 * s).exp() * c - 2 * s.cos() * s.sin() * c
    torch.testing.assert_close(x.grad, expected.detach())


def test_a_result_that_was_changed_in_place_is_kept_as_it_is() -> None:
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    with recomputing(["norm"]):
        y = recomputed("norm", lambda t: t + 1, x)
        y.mul_(3)
        loss = (y * y).sum()
    loss.backward()
    torch.testing.assert_close(x.grad, (18 * (x + 1)).detach())


def test_a_graph_that_is_never_freed_by_a_backward_pass_is_let_go() -> None:
    """As in a pipeline that computes the gradients of states before those of weights."""
    x = torch.randn(4, requires_grad=True)
    with recomputing(["norm"]):
        y = x.sigmoid()  # keeps its own result
        loss = y.sum()
    torch.autograd.grad(loss, x, retain_graph=True)
    held = StorageWeakRef(y.untyped_storage())
    del y, loss
    assert held.expired()


def test_nothing_is_noted_without_gradients_or_outside() -> None:
    calls: list[int] = []
    with recomputing(["norm"]), torch.no_grad():
        assert not doubled_sum(torch.ones(2), calls).requires_grad
    x = torch.ones(2, requires_grad=True)
    doubled_sum(x, calls).backward()
    assert len(calls) == 2
