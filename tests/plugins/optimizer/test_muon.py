"""Muon: against torch's own on matrices, stacks against single matrices, the polar factor, groups, exact resume."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dsv3.build import build_model
from dsv3.model.layers import joined_weights, matrices
from plugins.optimizer.adamw import adamw
from plugins.optimizer.muon import muon, orthogonalised

PATTERNS = ["*embed_tokens.weight", "*lm_head.weight", "*router.weight"]
SHAPES = {
    "embed_tokens.weight": (20, 8),
    "layers.0.self_attn.o_proj.weight": (8, 12),
    "layers.1.mlp.router.weight": (4, 8),
    "layers.1.mlp.experts.down_proj.weight": (4, 8, 6),
    "norm.weight": (8,),
    "lm_head.weight": (20, 8),
}
HIDDEN = {"layers.0.self_attn.o_proj.weight", "layers.1.mlp.experts.down_proj.weight"}


def build(parameters, **changes):
    options = {
        "momentum": 0.95,
        "newton_schulz_steps": 5,
        "newton_schulz_dtype": "float32",
        "adamw_params": PATTERNS,
        "lr_scale": 1.0,
        "adamw_lr_scale": 1.0,
        "betas": [0.9, 0.95],
        "eps": 1e-8,
        "weight_decay": 0.1,
        "sparse_lr_scale": 1.0,
    }
    return muon(parameters, **(options | changes))


def model(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [(name, nn.Parameter(torch.randn(shape, generator=generator))) for name, shape in SHAPES.items()]


def train(parameters, optimizer, steps, rate=0.01):
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for _, parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        optimizer.step()


MATRICES = st.tuples(st.integers(1, 3), st.integers(1, 24), st.integers(1, 24), st.integers(0, 1000))


@settings(max_examples=40, deadline=None)
@given(MATRICES)
def test_orthogonalised_keeps_singular_vectors_and_brings_values_near_one(case):
    """U f(S) V^T with f the iterated polynomial, from the float64 SVD."""
    n, rows, columns, seed = case
    x = torch.randn(n, rows, columns, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    u, s, vt = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm(dim=1, keepdim=True)
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    torch.testing.assert_close(orthogonalised(x, steps=5), u @ torch.diag_embed(s) @ vt, rtol=1e-6, atol=1e-6)
    assert s.max() < 1.25


def test_singular_values_of_a_well_conditioned_matrix_end_near_one():
    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(64, 32), full_matrices=False)
    x = (u * torch.linspace(0.1, 1, 32)) @ vt
    for dtype, low, high in ((torch.float32, 0.65, 1.25), (torch.bfloat16, 0.6, 1.3)):
        values = torch.linalg.svdvals(orthogonalised(x.to(dtype), steps=5).float())
        assert low < values.min() <= values.max() < high


def test_scale_does_not_matter_and_zero_stays_zero():
    x = torch.randn(5, 7)
    torch.testing.assert_close(orthogonalised(x * 1e4, steps=5), orthogonalised(x, steps=5), rtol=1e-4, atol=1e-5)
    assert not orthogonalised(torch.zeros(2, 3, 4), steps=5).any()


@pytest.mark.parametrize("shape", [(16, 24), (24, 16), (16, 16)])
def test_matrices_step_like_torchs_muon(shape):
    torch.manual_seed(0)
    start = torch.randn(shape)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    our = build([("hidden.weight", ours)], newton_schulz_dtype="bfloat16")
    their = torch.optim.Muon(
        [theirs], lr=0.02, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    for step in range(6):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        ours.grad, theirs.grad = gradient.clone(), gradient.clone()
        our.param_groups[0]["lr"] = 0.02
        our.step()
        their.step()
    moved = (theirs - start).detach()
    assert ((ours - theirs).norm() / moved.norm()).item() < 0.02


def test_a_stack_of_experts_steps_like_its_matrices():
    torch.manual_seed(0)
    start, gradient = torch.randn(3, 8, 6), torch.randn(3, 8, 6)
    stack = nn.Parameter(start.clone())
    single = [nn.Parameter(matrix.clone()) for matrix in start]
    stack.grad = gradient
    for parameter, part in zip(single, gradient, strict=True):
        parameter.grad = part
    for parameters in ([stack], single):
        optimizer = build([(f"{i}.weight", parameter) for i, parameter in enumerate(parameters)])
        optimizer.param_groups[0]["lr"] = 0.1
        optimizer.step()
    torch.testing.assert_close(stack.detach(), torch.stack([p.detach() for p in single]), rtol=1e-5, atol=1e-6)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(1, 12),
    st.sampled_from([(), (3,)]),
    st.integers(0, 1000),
)
def test_matrices_joined_in_one_weight_step_as_they_would_alone(rows, repeats, columns, stack, seed):
    """Several steps, so that the momentum is compared too; `stack`: the experts' [E, out, in]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*stack, repeats * sum(rows), columns)
    start, gradients = torch.randn(shape, generator=generator), torch.randn(3, *shape, generator=generator)

    def alone(tensor):
        return [part.flatten(-3, -2) for part in matrices(tensor, rows)]

    joined, single = nn.Parameter(start.clone()), [nn.Parameter(part.clone()) for part in alone(start)]
    one, other = (build([(f"{i}.weight", p) for i, p in enumerate(ps)]) for ps in ([joined], single))
    one.separate({joined: rows})
    for gradient in gradients:
        joined.grad = gradient.clone()
        for parameter, part in zip(single, alone(gradient), strict=True):
            parameter.grad = part.clone()
        for optimizer in (one, other):
            optimizer.param_groups[0]["lr"] = 0.1
            optimizer.step()
    for ours, theirs in zip(alone(joined.detach()), single, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


def test_gate_and_up_projections_move_alike(composed):
    """Of gradients of different sizes too: both with the root mean square that a matrix of their shape has."""
    model = build_model(composed("precision=fp32"))
    optimizer = build(model.named_parameters())
    optimizer.separate(joined_weights(model))
    joined = {name: p for name, p in model.named_parameters() if p in joined_weights(model)}
    kinds = {name.removesuffix(".weight").rpartition(".")[2] for name in joined}
    assert kinds == {"gate_up_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"}
    before = {name: parameter.detach().clone() for name, parameter in joined.items()}
    for name, parameter in joined.items():
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
        first, *_ = matrices(parameter.grad, joined_weights(model)[parameter])
        first.mul_(10)
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.param_groups[0]["weight_decay"] = 0.0
    optimizer.step()
    for name, parameter in joined.items():
        moved = matrices(parameter.detach() - before[name], joined_weights(model)[parameter])
        for part in moved:
            matrix = part.flatten(-3, -2)
            expected = 0.2 * (min(matrix.shape[-2:]) / matrix.shape[-2] / matrix.shape[-1]) ** 0.5
            expected *= max(matrix.shape[-2:]) ** 0.5
            assert matrix.square().mean().sqrt().item() == pytest.approx(expected, rel=0.25), name


@pytest.mark.parametrize("shape", [(32, 128), (128, 32), (4, 64, 48)])
def test_updates_have_the_size_of_adamws(shape):
    """Root mean square about 0.2 per unit of learning rate, for any shape, so that both share one rate."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.zeros(shape))
    parameter.grad = torch.randn(shape)
    optimizer = build([("hidden.weight", parameter)])
    optimizer.param_groups[0]["lr"] = 1.0
    optimizer.step()
    expected = 0.2 * min(shape[-2:]) ** 0.5 * max(shape[-2:]) ** 0.5 / (shape[-2] * shape[-1]) ** 0.5
    assert parameter.square().mean().sqrt().item() == pytest.approx(expected, rel=0.2)


def test_names_choose_the_rule_and_adamw_parameters_step_like_adamw():
    parameters, plain = model(), model()
    optimizer = build(parameters)
    rules = {id(p): group["rule"] for group in optimizer.param_groups for p in group["params"]}
    assert {name for name, p in parameters if rules[id(p)] == "muon"} == HIDDEN
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(SHAPES)
    reference = adamw(
        plain, betas=[0.9, 0.95], eps=1e-8, weight_decay=0.1, sparse_lr_scale=1.0, moments_dtype="float32"
    )
    train(parameters, optimizer, range(5))
    train(plain, reference, range(5))
    for (name, ours), (_, theirs) in zip(parameters, plain, strict=True):
        if name in HIDDEN:
            assert not torch.allclose(ours, theirs, atol=1e-3)
        else:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_norms_do_not_decay_and_matrices_do():
    parameters = model()
    before = {name: parameter.detach().clone() for name, parameter in parameters}
    optimizer = build(parameters)
    for _, parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.5
    optimizer.step()
    for name, parameter in parameters:
        factor = 1.0 if parameter.ndim < 2 else 0.95
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resume_is_bitwise(dtype):
    whole, first, resumed = model(), model(), model(seed=1)
    one = build(whole, newton_schulz_dtype=dtype)
    train(whole, one, range(8))
    two = build(first, newton_schulz_dtype=dtype)
    train(first, two, range(5))
    three = build(resumed, newton_schulz_dtype=dtype)
    three.load_state_dict(copy.deepcopy(two.state_dict()))
    for (_, target), (_, source) in zip(resumed, first, strict=True):
        target.data.copy_(source)
    train(resumed, three, range(5, 8))
    for (name, ours), (_, theirs) in zip(whole, resumed, strict=True):
        assert torch.equal(ours, theirs), name
    assert sorted(map(str, one.state_dict()["param_groups"])) == sorted(map(str, three.state_dict()["param_groups"]))


def test_it_fits_a_small_regression():
    torch.manual_seed(0)
    x, target = torch.randn(256, 16), torch.randn(16, 4)
    y = torch.tanh(x @ target)
    network = nn.Sequential(nn.Linear(16, 32, bias=False), nn.Tanh(), nn.Linear(32, 4, bias=False))
    optimizer = build(network.named_parameters(), adamw_params=["2.weight"], weight_decay=0.0)
    losses = []
    for _ in range(150):
        loss = (network(x) - y).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = 0.02
        optimizer.step()
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"newton_schulz_dtype": "float16"}, "newton_schulz_dtype=float16"),
        ({"adamw_params": ["*"]}, "at least one matrix"),
    ],
)
def test_mistakes_are_named(changes, words):
    with pytest.raises(ValueError, match=words):
        build(model(), **changes)


def test_each_rule_has_its_multiple_of_the_schedules_rate():
    scales = [group["lr_scale"] for group in build(model(), lr_scale=2.5, adamw_lr_scale=0.4).param_groups]
    assert scales == [2.5, 0.4, 0.4]
