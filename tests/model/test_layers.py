"""RMSNorm against torch's, and its written gradient by finite differences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.model.layers import RMSNorm, _RMSNorm


@given(rows=st.integers(1, 5), dim=st.integers(1, 40), scale=st.sampled_from([0.0, 1e-4, 1.0, 1e3]))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_equals_torchs(rows, dim, scale):
    x = scale * torch.randn(2, rows, dim, generator=torch.Generator().manual_seed(rows))
    norm = RMSNorm(dim, eps=1e-6)
    norm.weight.data.uniform_()
    expected = torch.nn.functional.rms_norm(x, (dim,), norm.weight, 1e-6)
    assert torch.allclose(norm(x), expected, rtol=1e-5, atol=1e-6)
    assert norm(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(3, 5), (2, 3, 4)])
def test_gradient_by_finite_differences(shape):
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(shape[-1], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: _RMSNorm.apply(x, w, 1e-6), (x, weight))


def test_gradients_of_a_bf16_stream_are_those_of_fp32_rounded():
    x = torch.randn(64, 32).bfloat16()
    upstream = torch.randn(64, 32).bfloat16()
    results = []
    for dtype in (torch.bfloat16, torch.float64):
        norm = RMSNorm(32, eps=1e-6).to(torch.float64 if dtype == torch.float64 else torch.float32)
        leaf = x.detach().to(dtype).requires_grad_()
        norm(leaf).backward(upstream.to(dtype))
        results.append((leaf.grad.double(), norm.weight.grad.double()))
    for low, exact in zip(*results, strict=True):
        assert (low - exact).norm() <= 0.004 * exact.norm()
