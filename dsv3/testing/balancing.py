"""Does a balancing method keep to `dsv3.contracts.Balancing`?"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dsv3.contracts import Routing
from dsv3.testing.requirement import require, require_meta, require_reloadable, require_uncast, tensors

ROWS, LENGTH = 3, 16


def check_balancing(factory: Callable[[], nn.Module], *, n_experts: int, top_k: int) -> None:
    """Raise AssertionError, saying what is wrong, unless `factory()` is a balancing method that the core can use."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        require_meta(factory)
        balancing = factory()
        require(isinstance(balancing, nn.Module), "a balancing method is an nn.Module")
        require(
            not list(balancing.parameters()),
            "a balancing method keeps its state in buffers: parameters would be optimised and decayed",
        )
        _fresh_bias(balancing, n_experts)
        _loss(balancing, n_experts, top_k)
        _observing(factory, n_experts)
        _direction(factory(), n_experts)
        _guarded(factory, n_experts)
        _resumes(factory, n_experts)


def _fresh_bias(balancing: Any, n_experts: int) -> None:
    bias_E = balancing.bias
    require(
        bias_E.shape == (n_experts,) and bias_E.dtype == torch.float32,
        f"`bias` must be float32 [{n_experts}], not {bias_E.dtype} {list(bias_E.shape)}",
    )
    require(not bias_E.requires_grad, "`bias` is moved by update(), never by a gradient")
    require(not bias_E.any(), "`bias` must be zero before anything was observed")


def _loss(balancing: Any, n_experts: int, top_k: int) -> None:
    mask_BT = torch.arange(LENGTH).expand(ROWS, LENGTH) < torch.tensor([[LENGTH], [LENGTH // 2], [1]])
    before = tensors(balancing)
    affinities_NE = torch.rand(ROWS * LENGTH, n_experts)
    loss, gradient_NE = _loss_and_gradient(balancing, affinities_NE, mask_BT, top_k)
    padded_N = ~mask_BT.flatten()
    require(not gradient_NE[padded_N].any(), "padding must have no part in the loss: mask_BT is False there")
    affinities_NE[padded_N] = torch.rand(int(padded_N.sum()), n_experts)
    other, _ = _loss_and_gradient(balancing, affinities_NE, mask_BT, top_k)
    require(torch.equal(loss, other), "the loss must not depend on the affinities of padding")
    empty, _ = _loss_and_gradient(balancing, affinities_NE, torch.zeros_like(mask_BT), top_k)
    require(empty == 0, f"the loss of a micro-batch of padding must be 0, not {empty.item()}")
    for name, tensor in tensors(balancing).items():
        require(torch.equal(tensor, before[name]), f"loss() must change no state; `{name}` changed")


def _loss_and_gradient(balancing: Any, affinities_NE: Tensor, mask_BT: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    leaf_NE = affinities_NE.clone().requires_grad_()
    scores_NK, experts_NK = leaf_NE.topk(top_k, dim=1)
    loss = balancing.loss(Routing(experts_NK, scores_NK, leaf_NE), (ROWS, LENGTH), mask_BT, 0)
    require(
        loss.shape == () and loss.dtype == torch.float32,
        f"loss() must return a float32 scalar, not {loss.dtype} {list(loss.shape)}",
    )
    require(loss.isfinite(), f"loss() is {loss.item()}")
    gradient_NE = torch.zeros_like(leaf_NE)
    if loss.requires_grad:
        found = torch.autograd.grad(loss, leaf_NE, allow_unused=True)[0]
        gradient_NE = gradient_NE if found is None else found
    require(gradient_NE.isfinite().all(), "the gradient of loss() with respect to the affinities is not finite")
    return loss.detach(), gradient_NE


def _observing(factory: Callable[[], nn.Module], n_experts: int) -> None:
    whole: Any = factory()
    parts: Any = factory()
    untouched: Any = factory()
    first_E, second_E = (torch.randint(50, (n_experts,)) for _ in range(2))
    whole.observe(first_E + second_E)
    parts.observe(first_E)
    parts.observe(second_E)
    require(not parts.bias.any(), "observe() must not move the bias: update() does, once per optimiser step")
    whole.update(0)
    parts.update(0)
    require(torch.equal(whole.bias, parts.bias), "two micro-batches must count like one that holds both")
    once_E = whole.bias.clone()
    whole.update(0)
    require(
        torch.equal(whole.bias, once_E),
        "update() must apply what was observed once, and change nothing where nothing was observed",
    )
    require(
        not untouched.bias.any(),
        "modules made by one factory must share no state: make nested parts in the constructor (`_partial_: true`)",
    )


def _direction(balancing: Any, n_experts: int) -> None:
    counts_E = torch.full((n_experts,), 10)
    counts_E[0], counts_E[-1] = 30, 0
    balancing.observe(counts_E)
    balancing.update(0)
    require(
        balancing.bias[0] <= balancing.bias[-1],
        "the bias of an overloaded expert must not rise above that of an idle one",
    )


def _guarded(factory: Callable[[], nn.Module], n_experts: int) -> None:
    balancing: Any = factory()
    balancing.observe(torch.randint(50, (n_experts,)))
    balancing.update(0)
    balancing.observe(torch.randint(50, (n_experts,)))
    bias_E = balancing.bias.clone()
    require_uncast(balancing)
    require(
        balancing.bias.dtype == torch.float32 and torch.equal(balancing.bias, bias_E),
        "`bias` must stay float32, with its values, when the whole model is cast",
    )


def _resumes(factory: Callable[[], nn.Module], n_experts: int) -> None:
    balancing: Any = factory()
    fresh: Any = factory()
    balancing.observe(torch.randint(50, (n_experts,)))
    balancing.update(0)
    balancing.observe(torch.randint(50, (n_experts,)))
    require_reloadable(balancing, fresh)
    for module in (balancing, fresh):
        module.update(1)
    require(
        torch.equal(balancing.bias, fresh.bias),
        "resumed between observe() and update(), the bias must move as in the run that went on: save the counts",
    )
