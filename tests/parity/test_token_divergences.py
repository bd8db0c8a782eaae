"""Divergences between two models' next tokens: their values against torch's, their gradient by finite differences."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.contracts import Head
from dsv3.model import losses
from dsv3.model.losses import token_divergences

N, V, WIDTH, OTHER_WIDTH = 7, 9, 5, 3


@pytest.fixture(params=[2, 3, 1024], autouse=True)
def chunk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK", request.param)


def states(seed: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Hidden states and a head, FP32 or FP64."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (N, width), (V, width)
    hidden, weight = (torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes)
    return hidden, weight


def head(weight_VD: Tensor, dtype: torch.dtype) -> Head:
    return Head(weight_VD, weight_VD.detach().to(dtype))


def divergences(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], *, reverse: bool, dtype: Any) -> Tensor:
    return token_divergences(ours[0], head(ours[1], dtype), theirs[0], head(theirs[1], dtype), reverse=reverse)


@pytest.mark.parametrize("reverse", [True, False])
def test_gradient(reverse: bool) -> None:
    theirs = states(1, OTHER_WIDTH, torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: divergences((h, w), theirs, reverse=reverse, dtype=torch.float64).square(),
        states(0, WIDTH, torch.float64),
    )


@pytest.mark.parametrize("reverse", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_value_and_gradient_equal_torch(reverse: bool, dtype: torch.dtype) -> None:
    """In BF16 the products are those of BF16, and the divergence is FP32."""
    results = []
    for is_ours in (True, False):
        ours, theirs = states(0, WIDTH, torch.float32), states(1, OTHER_WIDTH, torch.float32)
        if is_ours:
            found = divergences(ours, theirs, reverse=reverse, dtype=dtype)
        else:
            p, q = (
                (hidden.to(dtype) @ weight.to(dtype).T).float().log_softmax(-1) for hidden, weight in (ours, theirs)
            )
            first, second = (q.detach(), p) if reverse else (p, q.detach())  # kl_div(a, b) is KL(b || a)
            found = F.kl_div(first, second, log_target=True, reduction="none").sum(-1)
        assert found.dtype == torch.float32
        (found * torch.arange(1, N + 1)).sum().backward()
        assert theirs[0].grad is theirs[1].grad is None
        results.append((found.detach(), ours[0].grad, ours[1].grad))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def test_the_two_directions_differ_and_are_zero_for_equal_models() -> None:
    ours, theirs = states(0, WIDTH, torch.float32), states(1, WIDTH, torch.float32)
    found = [divergences(ours, theirs, reverse=reverse, dtype=torch.float32) for reverse in (True, False)]
    assert all((each > 0).all() for each in found)
    assert not torch.allclose(*found)
    for reverse in (True, False):
        assert divergences(ours, ours, reverse=reverse, dtype=torch.float32).abs().max() < 1e-6


def test_logits_of_any_size_are_finite() -> None:
    (hidden, weight), theirs = states(0, WIDTH, torch.float32), states(1, WIDTH, torch.float32)
    for reverse in (True, False):
        found = divergences((hidden * 1e4, weight), theirs, reverse=reverse, dtype=torch.float32)
        (gradient,) = torch.autograd.grad(found.sum(), weight)
        assert found.isfinite().all()
        assert gradient.isfinite().all()
