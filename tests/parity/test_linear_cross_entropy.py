"""The chunked loss: its value against torch's, its hand-written gradient by finite differences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.contracts import IGNORE
from dsv3.model import losses

few = settings(max_examples=20, deadline=None, derandomize=True)


def problem(tokens, seed, dtype=torch.float64, dim=5, vocabulary=7):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, dim, generator=generator, dtype=dtype)
    weight = torch.randn(vocabulary, dim, generator=generator, dtype=dtype)
    targets = torch.randint(vocabulary, (tokens,), generator=generator)
    ignored = torch.rand(tokens, generator=generator) < 0.3
    return hidden.requires_grad_(), weight.requires_grad_(), targets.masked_fill(ignored, IGNORE)


@pytest.fixture(params=[2, 3, 1024])
def chunk(request, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", request.param)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("seed", range(3))
def test_gradient(seed):
    hidden, weight, targets = problem(7, seed)
    assert torch.autograd.gradcheck(
        lambda h, w: losses.linear_cross_entropy(h, w, targets).total.square(), (hidden, weight)
    )


@given(tokens=st.integers(1, 40), seed=st.integers(0, 99), scale=st.sampled_from([1.0, 100.0]))
@few
def test_value_count_and_gradient_equal_torch(tokens, seed, scale):
    results = []
    for ours in (True, False):
        hidden, weight, targets = problem(tokens, seed, torch.float32)
        logits = scale * hidden @ weight.T
        if ours:
            found = losses.linear_cross_entropy(scale * hidden, weight, targets)
            total = found.total
            assert found.targets == (targets != IGNORE).sum()
            assert found.correct == (logits.argmax(-1) == targets).sum()
        else:
            total = torch.nn.functional.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="sum")
        total.backward()
        results.append((total, hidden.grad, weight.grad))
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5 * max(scale, 1))


@pytest.mark.usefixtures("chunk")
def test_losses_of_each_token():
    hidden, weight, targets = problem(9, 0, torch.float32)
    found = losses.token_losses(hidden, weight, targets)
    expected = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, ignore_index=IGNORE, reduction="none")
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(losses.greedy_tokens(hidden, weight), (hidden @ weight.T).argmax(-1))
    assert not found.requires_grad


def test_without_gradients_and_with_a_frozen_head():
    hidden, weight, targets = problem(6, 0)
    total = losses.linear_cross_entropy(hidden, weight, targets).total
    with torch.no_grad():
        assert torch.equal(losses.linear_cross_entropy(hidden, weight, targets).total, total)
    losses.linear_cross_entropy(hidden, weight.detach(), targets).total.backward()
    reference = hidden.detach().clone().requires_grad_()
    torch.nn.functional.cross_entropy(reference @ weight.detach().T, targets, reduction="sum").backward()
    assert torch.allclose(hidden.grad, reference.grad)


def test_bf16_states_with_an_fp32_head():
    """The gradient of the head is FP32, so that micro-batches add up in it."""
    hidden, weight, targets = problem(64, 0, torch.float32, dim=32, vocabulary=50)
    low = hidden.detach().bfloat16().requires_grad_()
    loss = losses.linear_cross_entropy(low, weight, targets)
    loss.total.backward()
    assert loss.total.dtype == weight.grad.dtype == torch.float32
    assert low.grad.dtype == torch.bfloat16
    exact = torch.nn.functional.cross_entropy(hidden @ weight.detach().T, targets, reduction="sum")
    assert abs(loss.total.item() / exact.item() - 1) < 0.01


def test_products_run_in_the_dtype_that_the_head_is_given_in():
    """A head in FP32 over states in BF16: the loss, and both gradients, are those of the states cast up."""
    hidden, weight, targets = problem(40, 3, dtype=torch.float32)
    low = hidden.detach().bfloat16().requires_grad_()
    high = low.detach().float().requires_grad_()
    wide, exact = weight.detach().clone().requires_grad_(), weight.detach().clone().requires_grad_()
    loss = losses.linear_cross_entropy(low, wide, targets, copy_VD=wide.detach()).total
    expected = torch.nn.functional.cross_entropy(high @ exact.T, targets, ignore_index=IGNORE, reduction="sum")
    loss.backward()
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert torch.allclose(wide.grad, exact.grad, rtol=1e-4, atol=1e-5)
    assert torch.allclose(low.grad.float(), high.grad, rtol=2**-8, atol=1e-5)
    assert torch.allclose(losses.token_losses(low, wide.detach(), targets).sum(), expected, rtol=1e-5)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("seed", range(3))
def test_gradient_of_log_probabilities(seed):
    hidden, weight, targets = problem(7, seed)
    assert torch.autograd.gradcheck(lambda h, w: losses.token_log_probs(h, w, targets).exp(), (hidden, weight))


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_and_their_gradient_equal_torch(dtype):
    hidden, weight, targets = problem(40, 0, torch.float32, dim=8)
    upstream = torch.randn(40, generator=torch.Generator().manual_seed(1))
    found = losses.token_log_probs(hidden, weight, targets, copy_VD=weight.detach().to(dtype))
    copy = weight.to(dtype)
    expected = torch.log_softmax((hidden.to(dtype) @ copy.T).float(), -1)
    expected = expected.gather(1, targets.clamp(min=0).unsqueeze(1)).squeeze(1) * (targets != IGNORE)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.03}
    torch.testing.assert_close(found, expected, **tolerance)
    for mine, theirs in zip(
        torch.autograd.grad((found * upstream).sum(), (hidden, weight)),
        torch.autograd.grad((expected * upstream).sum(), (hidden, weight)),
        strict=True,
    ):
        assert mine.dtype == theirs.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, **tolerance)
