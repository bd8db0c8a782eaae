"""Local dispatch against the sum of eq. 12 written out, and its two hand-written gradients by finite differences."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.contracts import Routing
from plugins.dispatch.local import CopyRows, LocalDispatch, SumRows, summed

few = settings(max_examples=25, deadline=None, derandomize=True)


def routing_of(tokens, experts, top_k, seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=generator, dtype=dtype)
    chosen = scores.topk(top_k, -1)
    return Routing(chosen.indices, torch.rand(tokens, top_k, generator=generator, dtype=dtype), scores)


class Linear:
    """Expert e multiplies by its own matrix; remembers what it was given."""

    def __init__(self, experts, dim, dtype, seed=0):
        self.weight = torch.randn(experts, dim, dim, generator=torch.Generator().manual_seed(seed), dtype=dtype)
        self.counts = None

    def __call__(self, x_MD, counts_E, gates_M):
        self.counts = counts_E
        parts = x_MD.split(counts_E.tolist())
        rows = torch.cat([x @ w for x, w in zip(parts, self.weight.to(x_MD.dtype), strict=True)])
        return rows * gates_M.to(rows.dtype).unsqueeze(1)


def expected(x, routing, weight):
    """sum_k g_k x W_k, token by token."""
    rows = []
    for token, (experts, gates) in zip(x, zip(routing.experts_NK, routing.gates_NK, strict=True), strict=True):
        rows.append(sum(g * (token @ weight[e]) for e, g in zip(experts, gates, strict=True)))
    return torch.stack(rows)


sizes = {
    "multiple": st.integers(1, 5),
    "tokens": st.integers(1, 12),
    "experts": st.integers(1, 7),
    "top_k": st.integers(1, 7),
    "seed": st.integers(0, 99),
}


@given(**sizes)
@few
def test_equals_the_sum_in_fp64_with_gradients(multiple, tokens, experts, top_k, seed):
    routing = routing_of(tokens, experts, min(top_k, experts), seed, torch.float64)
    layer = Linear(experts, 5, torch.float64)
    grads = []
    for combine in (
        lambda x, r: LocalDispatch(pad_multiple=multiple)(x, r, layer),
        lambda x, r: expected(x, r, layer.weight),
    ):
        x = torch.randn(tokens, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        gates = routing.gates_NK.clone()
        x.requires_grad_()
        gates.requires_grad_()
        y = combine(x, routing._replace(gates_NK=gates))
        y.square().sum().backward()
        grads.append((y, x.grad, gates.grad))
    for one, other in zip(*grads, strict=True):
        assert torch.allclose(one, other, atol=1e-12)


@given(**sizes)
@few
def test_no_token_is_dropped(multiple, tokens, experts, top_k, seed):
    """Experts get their load, filled up to a whole multiple; those that only pass rows on give x * sum of gates."""
    routing = routing_of(tokens, experts, min(top_k, experts), seed)
    seen = []

    def passing(x_MD, counts_E, gates_M):
        seen.append(counts_E)
        return x_MD * gates_M.unsqueeze(1)

    x = torch.randn(tokens, 3, generator=torch.Generator().manual_seed(seed))
    y = LocalDispatch(pad_multiple=multiple)(x, routing, passing)
    assert seen[0].dtype == torch.int64
    load = routing.experts_NK.flatten().bincount(minlength=experts).tolist()
    assert seen[0].tolist() == [-(-count // multiple) * multiple for count in load]
    assert torch.allclose(y, x * routing.gates_NK.sum(-1, keepdim=True), atol=1e-5)


@given(seed=st.integers(0, 99), multiple=st.sampled_from([1, 4]))
@few
def test_order_of_tokens_does_not_matter(seed, multiple):
    routing, layer = routing_of(9, 5, 2, seed), Linear(5, 4, torch.float32)
    generator = torch.Generator().manual_seed(seed)
    x, order = torch.randn(9, 4, generator=generator), torch.randperm(9, generator=generator)
    moved = Routing(*(field[order] for field in routing))
    assert torch.allclose(
        LocalDispatch(pad_multiple=multiple)(x[order], moved, layer),
        LocalDispatch(pad_multiple=multiple)(x, routing, layer)[order],
        atol=1e-5,
    )


@pytest.mark.parametrize("multiple", [1, 4])
def test_output_keeps_the_dtype_of_the_stream(multiple):
    routing, layer = routing_of(6, 4, 2, 0), Linear(4, 8, torch.float32)
    x = torch.randn(6, 8).bfloat16().requires_grad_()
    gates = routing.gates_NK.clone().requires_grad_()
    y = LocalDispatch(pad_multiple=multiple)(x, routing._replace(gates_NK=gates), layer)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.bfloat16
    assert gates.grad.dtype == torch.float32


def test_padding_is_copies_of_the_experts_own_tokens():
    """Others would change the scale that an expert's tokens share in FP8, and so their gradient."""
    routing, seen = routing_of(9, 5, 2, 0), []
    x = torch.arange(9.0).unsqueeze(1).requires_grad_()

    def experts(rows_RD, counts_E, gates_R):
        seen.extend(zip(rows_RD.split(counts_E.tolist()), gates_R.split(counts_E.tolist()), strict=True))
        return rows_RD

    LocalDispatch(pad_multiple=8)(x, routing, experts)
    for expert, (rows, gates) in enumerate(seen):
        tokens = (routing.experts_NK == expert).any(1).nonzero().flatten().tolist()
        padding = [tokens[-1]] * (-len(tokens) % 8) if tokens else []
        assert rows.flatten().tolist() == [*tokens, *padding]
        assert gates[len(tokens) :].eq(0).all()
    assert len(seen) == 5


def test_a_multiple_below_one():
    with pytest.raises(ValueError, match=r"dispatch.pad_multiple=0: must be at least 1"):
        LocalDispatch(pad_multiple=0)


def places(tokens, experts, top_k, seed):
    flat = routing_of(tokens, experts, top_k, seed).experts_NK.flatten()
    order = flat.argsort(stable=True)
    return order // top_k, order.argsort().view(tokens, top_k)


@pytest.mark.parametrize("seed", range(3))
def test_gradient_of_copying_and_of_summing(seed):
    token_M, places_NK = places(4, 3, 2, seed)
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    rows = torch.randn(8, 3, dtype=torch.float64, requires_grad=True)
    where = token_M, places_NK.flatten(), torch.arange(0, 8, 2)
    assert torch.autograd.gradcheck(lambda x: CopyRows.apply(x, *where), (x,))
    assert torch.autograd.gradcheck(lambda rows: SumRows.apply(rows, *where), (rows,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_sums_are_accumulated_in_fp32_at_least(dtype):
    _, places_NK = places(64, 8, 4, 0)
    rows = torch.randn(256, 16, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = rows.double()[places_NK].sum(1)
    wide = torch.promote_types(dtype, torch.float32)
    assert (summed(rows, places_NK.flatten(), torch.arange(0, 256, 4)).double() - exact).abs().max() <= (
        exact.to(wide).to(dtype).double() - exact
    ).abs().max() + 1e-6
