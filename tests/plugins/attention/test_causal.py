"""Attention in blocks of queries against torch's own, and against the formula; its gradient by finite differences."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.attention import causal
from plugins.attention.causal import causal_attention
from plugins.attention.masks import attention_mask

few = settings(max_examples=25, deadline=None, derandomize=True)


def drawn(rows, heads, length, widths, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, heads, length, w, generator=generator, dtype=dtype).requires_grad_() for w in widths]


@given(
    length=st.integers(1, 300),
    rows=st.integers(1, 2),
    heads=st.integers(1, 3),
    qk=st.integers(1, 9),
    v=st.integers(1, 9),
    documents=st.booleans(),
    seed=st.integers(0, 99),
)
@few
def test_equals_torchs_attention_with_gradients(length, rows, heads, qk, v, documents, seed):
    ids = torch.randint(0, 2, (rows, length)).cumsum(-1) if documents else None
    results = []
    for ours in (True, False):
        q, k, val = drawn(rows, heads, length, (qk, qk, v), seed)
        if ours:
            out = causal_attention(q * 0.3, k, val, document_ids_BT=ids)
        else:
            mask = attention_mask(length, length, ids, q.device)
            out = F.scaled_dot_product_attention(q, k, val, attn_mask=mask, is_causal=mask is None, scale=0.3)
        out.square().sum().backward()
        results.append((out, q.grad, k.grad, val.grad))
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, atol=1e-10)


@pytest.mark.parametrize("documents", [False, True])
def test_gradient_by_finite_differences(documents, monkeypatch):
    monkeypatch.setattr(causal, "BLOCK", 3)
    ids = torch.tensor([[1, 1, 1, 2, 2, 2, 2, 3]]) if documents else None
    inputs = drawn(1, 2, 8, (3, 3, 2), 0)
    assert torch.autograd.gradcheck(lambda q, k, v: causal_attention(q, k, v, document_ids_BT=ids), inputs)


def test_rows_too_long_to_keep_their_probabilities(monkeypatch):
    q, k, v = drawn(1, 2, 12, (4, 4, 3), 0)
    kept = causal_attention(q, k, v, document_ids_BT=None)
    monkeypatch.setattr(causal, "LONGEST", 8)
    assert torch.allclose(causal_attention(q, k, v, document_ids_BT=None), kept)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_no_less_exact_than_torchs_kernel(dtype):
    """Error against FP64, of the output and of each gradient; in BF16 the scores are rounded, hence the factor."""
    exact = drawn(2, 2, 256, (64, 64, 64), 0)
    upstream = torch.randn(2, 2, 256, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    reference = [*attended(exact, upstream, torchs=True)]
    errors = []
    for torchs in (False, True):
        low = [t.detach().to(dtype).requires_grad_() for t in exact]
        found = attended(low, upstream.to(dtype), torchs=torchs)
        errors.append([(f.double() - r).norm() / r.norm() for f, r in zip(found, reference, strict=True)])
    for ours, theirs in zip(*errors, strict=True):
        assert ours < 1.5 * theirs


def attended(inputs, upstream, *, torchs):
    q, k, v = inputs
    if torchs:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.125)
    else:
        out = causal_attention(q * 0.125, k, v, document_ids_BT=None)
    return out, *torch.autograd.grad(out, inputs, upstream)
