"""Grouped experts, looped experts and an FP64 reference are one function; broken ones are found by the kit."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import nn

from dsv3.testing import check_experts
from dsv3.testing.plain import Plain, drawn
from plugins.experts.grouped import GroupedExperts, LoopExperts
from plugins.precision.plain import BF16, FP32

CONF = Path(__file__).parents[3] / "conf"
few = settings(max_examples=20, deadline=None, derandomize=True)


def made(kind, *, dim=16, inter=8, n_experts=4, precision=FP32):
    torch.manual_seed(0)
    return drawn(kind(dim=dim, inter_dim=inter, n_experts=n_experts, precision=precision()))


def reference(experts, x_MD, counts_E):
    """down(silu(gate x) * up x) row by row, FP64."""
    gate_up, down = (m.weight.detach().double() for m in (experts.gate_up_proj, experts.down_proj))
    rows, inter = [], down.shape[2]
    for row, expert in zip(x_MD.double(), torch.arange(len(counts_E)).repeat_interleave(counts_E), strict=True):
        gate, up = gate_up[expert, :inter] @ row, gate_up[expert, inter:] @ row
        rows.append(down[expert] @ (gate / (1 + (-gate).exp()) * up))
    return torch.stack(rows)


@pytest.mark.parametrize("kind", [GroupedExperts, LoopExperts])
@given(
    counts=st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any),
    dim=st.sampled_from([8, 24]),
    inter=st.sampled_from([8, 16]),
    seed=st.integers(0, 99),
)
@few
def test_equals_the_formula_in_fp64(kind, counts, dim, inter, seed):
    experts = made(kind, dim=dim, inter=inter, n_experts=len(counts))
    counts_E = torch.tensor(counts)
    x = torch.randn(sum(counts), dim, generator=torch.Generator().manual_seed(seed))
    gates = torch.rand(len(x), generator=torch.Generator().manual_seed(seed))
    expected = gates.unsqueeze(1) * reference(experts, x, counts_E)
    assert torch.allclose(experts(x, counts_E, gates).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("precision", [FP32, BF16])
def test_grouped_equals_loop_with_gradients(precision):
    counts_E = torch.tensor([5, 0, 3, 8])
    results = []
    for kind in (GroupedExperts, LoopExperts):
        experts = made(kind, precision=precision)
        x = torch.randn(16, 16, generator=torch.Generator().manual_seed(1)).to(precision.activation_dtype)
        x.requires_grad_()
        gates = torch.linspace(0.5, 1.5, 16).requires_grad_()
        y = experts(x, counts_E, gates)
        y.float().square().sum().backward()
        results.append([y, x.grad, gates.grad, *(p.grad for p in experts.parameters())])
    tolerance = 1e-5 if precision is FP32 else 2e-2
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one.float(), other.float(), rtol=tolerance, atol=tolerance * other.abs().max().item())


def test_the_grouped_product_in_fp64_falls_back():
    """torch's kernel has no FP64, and oracles need it."""
    from plugins.experts.grouped import grouped_mm

    x, weight = torch.randn(6, 8, dtype=torch.float64), torch.randn(2, 3, 8, dtype=torch.float64)
    found = grouped_mm(x, weight, torch.tensor([2, 4]))
    assert torch.equal(found, torch.cat((x[:2] @ weight[0].T, x[2:] @ weight[1].T)))


@pytest.mark.parametrize("size", [{"dim": 20}, {"inter": 12}])
def test_sizes_that_the_kernel_lacks(size):
    with pytest.raises(ValueError, match="multiple of 8"):
        made(GroupedExperts, **size)
    made(LoopExperts, **size)


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "experts").glob("*.yaml")))
def test_shipped_experts_conform(name):
    part = OmegaConf.load(CONF / "experts" / f"{name}.yaml")
    model = {"dim": 16, "moe_inter_dim": 8, "n_routed_experts": 6}
    check_experts(instantiate(OmegaConf.create({"model": model, "experts": part}).experts), dim=16, n_experts=6)


class Good(LoopExperts):
    def __init__(self, *, precision):
        super().__init__(dim=16, inter_dim=8, n_experts=4, precision=precision)


def test_good_experts_conform():
    check_experts(Good, dim=16, n_experts=4)


class SharedScale(Good):
    def __init__(self, *, precision):
        super().__init__(precision=precision)
        self.scale = torch.nn.Parameter(torch.ones(3))


class Misplaced(Good):
    def forward(self, x, counts, gates):
        return super().forward(x, counts.flip(0), gates)


class Mixed(Good):
    def forward(self, x, counts, gates):
        return super().forward(x, counts, gates) + (x.mean(0) if len(x) else 0)


class OneForAll(Good):
    def forward(self, x, counts, gates):
        everything = torch.zeros_like(counts)
        everything[0] = len(x)
        return super().forward(x, everything, gates)


class Placed(Good):
    def forward(self, x, counts, gates):
        return super().forward(x, counts, gates) * (1 + torch.arange(len(x), dtype=x.dtype).unsqueeze(1) % 2)


class Upcast(Good):
    def forward(self, x, counts, gates):
        return super().forward(x, counts, gates).float()


class NothingForNone(Good):
    def forward(self, x, counts, gates):
        return super().forward(x, counts, gates) if len(x) else x.new_zeros(0, 1)


class Detached(Good):
    def forward(self, x, counts, gates):
        return self.down_proj(self.gate_up_proj(x, counts).detach().chunk(2, -1)[0], counts)


class GatesForgotten(Good):
    def forward(self, x, counts, gates):
        return super().forward(x, counts, torch.ones_like(gates))


class GatesDetached(Good):
    def forward(self, x, counts, gates):
        return super().forward(x, counts, gates.detach()) + 0 * gates.sum()


class OwnLayers(nn.Module):
    def __init__(self, *, precision):
        super().__init__()
        self.layer = nn.Linear(16, 16)


class AllForTheHead(Plain):
    def grouped_linear(self, *sizes, role, grouped_mm):
        return super().grouped_linear(*sizes, role="head", grouped_mm=grouped_mm)


class WrongRole(Good):
    def __init__(self, *, precision):
        other = AllForTheHead(precision.activation_dtype)
        other.roles = precision.roles
        super().__init__(precision=other)


class Forgetful(Good):
    def __init__(self, *, precision):
        super().__init__(precision=precision)
        self.scale = torch.rand(())

    def forward(self, x, counts, gates):
        return super().forward(x, counts, gates) * self.scale.to(x.dtype)


@pytest.mark.parametrize(
    ("experts", "words"),
    [
        (OwnLayers, "must be made by the `grouped_linear`"),
        (WrongRole, "must be made by the `grouped_linear`"),
        (SharedScale, "an equal part of the parameters"),
        (Upcast, "the output for"),
        (NothingForNone, "the output for 0 rows"),
        (Misplaced, "rows of the others"),
        (Mixed, "rows of the others"),
        (OneForAll, "weights of its own"),
        (Placed, "rows of the others|its place among"),
        (GatesForgotten, "multiplied by the row's gate"),
        (GatesDetached, "the gradient of a gate"),
        (Detached, "gate|must get a gradient"),
        (Forgetful, "restored from a state_dict"),
    ],
)
def test_faulty_experts_are_found(experts, words):
    with pytest.raises(AssertionError, match=words):
        check_experts(experts, dim=16, n_experts=4)
