"""FP8 by blocks: its three products against the recipe in FP64, what it keeps, and which roles it leaves alone."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch.autograd.graph import saved_tensors_hooks

from dsv3.model.layers import SwiGLU, cached_weight_casts
from dsv3.testing import check_precision
from dsv3.testing.plain import drawn, loop_mm
from plugins.experts.grouped import GroupedExperts, grouped_mm
from plugins.precision.held_swiglu import origin_of
from plugins.precision.plain import CastGroupedLinear, CastLinear
from tests.plugins.precision import reference

FILE = Path(__file__).parents[3] / "conf" / "precision" / "fp8_blockwise.yaml"
UNIT = 2.0**-24  # half the last place of 1 in FP32
TILE = 16
few = settings(max_examples=15, deadline=None, derandomize=True)


def made(**settings):
    return instantiate(OmegaConf.merge(OmegaConf.load(FILE), {"tile": TILE, **settings}), _convert_="all")


def inputs(shape, seed):
    """Channels of different sizes, in BF16, as activations and their gradients are."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.exp2(3 * torch.randn(shape[-1], generator=generator))
    return (torch.randn(shape, generator=generator) * sizes).bfloat16()


def fp64(x):
    return x.detach().double().numpy()


class Products:
    """The three products of one layer in FP64, from the recipe as the report words it, and bounds on FP32 sums."""

    def __init__(self, role, x, weight, dy, *, power_of_two=False, grad_blocks=False):
        experts_read = {"power_of_two": power_of_two or role == "expert_gate_up"}
        q = reference.quantise
        pow2 = {"power_of_two": power_of_two}
        if role == "attention_out":
            held = q(x, "E5M6", 1, TILE, power_of_two=True)[2]
            x_fprop = q(held, "E4M3", 1, TILE, power_of_two=True)[2]
            x_wgrad = q(held, "E4M3", TILE, 1, power_of_two=True)[2]
        else:
            x_fprop = q(x, "E4M3", 1, TILE, **experts_read)[2]
            x_wgrad = q(x_fprop, "E4M3", TILE, 1, **experts_read)[2]
        w = q(weight, "E4M3", TILE, TILE, **pow2)[2]
        dy_scales = pow2
        if role == "expert_down":  # Dgrad multiplies what arrived
            dy, dy_scales = q(dy, "E4M3", 1, TILE, power_of_two=True)[2], {"power_of_two": True}
            dy_dgrad = q(dy, "E4M3", TILE, TILE, **pow2)[2] if grad_blocks else dy
        else:
            dy_dgrad = q(dy, "E4M3", TILE if grad_blocks else 1, TILE, **pow2)[2]
        dy_wgrad = q(dy, "E4M3", TILE, 1, **dy_scales)[2]
        self.y = self.product(x_fprop, w.T)
        self.dx = self.product(dy_dgrad, w)
        self.dw = self.product(dy_wgrad.T, x_wgrad)

    @staticmethod
    def product(a, b):
        """The exact product, and how far FP32 may be off: one rounding for each product and each addition."""
        return a @ b, (a.shape[1] + 1) * UNIT * (np.abs(a) @ np.abs(b))


def assert_within(found, expected, last_place=0.0):
    """`last_place`: relative error of the last rounding, to the dtype of the result."""
    exact, bound = expected
    assert (np.abs(fp64(found) - exact) <= bound + last_place * (np.abs(exact) + bound)).all()


def results(layer, x, dy, *more):
    leaf = x.clone().requires_grad_()
    y = layer(leaf, *more)
    y.backward(dy)
    return y, leaf.grad, layer.weight.grad


@few
@given(
    role=st.sampled_from(["attention_down", "attention_out", "ffn_gate_up", "mtp_projection"]),
    sizes=st.tuples(st.integers(1, 50), st.sampled_from([16, 24, 80]), st.sampled_from([16, 40])),
    power_of_two=st.booleans(),
    grad_blocks=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_products_equal_the_recipe_in_fp64(role, sizes, power_of_two, grad_blocks, seed):
    n, width, out = sizes
    precision = made(power_of_two_scales=power_of_two, activation_grad_blocks=grad_blocks)
    precision.activation_dtype = torch.float32  # so that results are not rounded to BF16
    torch.manual_seed(seed)
    layer = drawn(precision.linear(width, out, role=role))
    x, dy = inputs((n, width), seed), inputs((n, out), seed + 1) * 1e-3
    expected = Products(role, fp64(x), fp64(layer.weight), fp64(dy), power_of_two=power_of_two, grad_blocks=grad_blocks)
    y, dx, dw = results(layer, x.float(), dy.float())
    assert_within(y, expected.y)
    assert_within(dx, expected.dx)
    assert_within(dw, expected.dw)


@pytest.mark.parametrize("power_of_two", [False, True])
def test_bf16_activations_are_rounded_once(power_of_two):
    """With powers of two the products run in BF16, and lose nothing by it."""
    layer = drawn(made(power_of_two_scales=power_of_two).linear(80, 40, role="ffn_gate_up"))
    x, dy = inputs((50, 80), 3), inputs((50, 40), 4)
    expected = Products("ffn_gate_up", fp64(x), fp64(layer.weight), fp64(dy), power_of_two=power_of_two)
    y, dx, dw = results(layer, x, dy)
    assert (y.dtype, dx.dtype, dw.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert layer.dtype_of("x_fprop", "w_fprop") == (torch.bfloat16 if power_of_two else torch.float32)
    assert_within(y, expected.y, 2**-8)
    assert_within(dx, expected.dx, 2**-8)
    assert_within(dw, expected.dw)


@few
@given(
    role=st.sampled_from(["expert_gate_up", "expert_down"]),
    counts=st.lists(st.sampled_from([0, 1, 15, 17, 40]), min_size=2, max_size=5).filter(any),
    grad_blocks=st.booleans(),
    product=st.sampled_from([grouped_mm, loop_mm]),
    seed=st.integers(0, 1000),
)
def test_each_expert_computes_as_if_alone(role, counts, grad_blocks, product, seed):
    precision = made(activation_grad_blocks=grad_blocks)
    precision.activation_dtype = torch.float32
    torch.manual_seed(seed)
    layer = drawn(precision.grouped_linear(len(counts), 24, 40, role=role, grouped_mm=product))
    x, dy = inputs((sum(counts), 24), seed), inputs((sum(counts), 40), seed + 1)
    y, dx, dw = results(layer, x.float(), dy.float(), torch.tensor(counts))
    parts = zip(*(t.split(counts) for t in (x, dy, y, dx)), layer.weight, dw, strict=True)
    for x_e, dy_e, y_e, dx_e, w_e, dw_e in parts:
        if not len(x_e):
            assert not dw_e.any()
            continue
        expected = Products(role, fp64(x_e), fp64(w_e), fp64(dy_e), grad_blocks=grad_blocks)
        assert_within(y_e, expected.y)
        assert_within(dx_e, expected.dx)
        assert_within(dw_e, expected.dw)


def test_no_token_at_all():
    layer = drawn(made().grouped_linear(3, 24, 40, role="expert_down", grouped_mm=grouped_mm))
    y, dx, dw = results(layer, torch.zeros(0, 24), torch.zeros(0, 40).bfloat16(), torch.tensor([0, 0, 0]))
    assert (y.shape, dx.shape) == ((0, 40), (0, 24))
    assert not dw.any()


def kept_bytes(function, x):
    """Bytes of each dtype that the backward pass of function(x) keeps, parameters apart; no storage counted twice."""
    kept = {}

    def pack(tensor):
        if not isinstance(tensor, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = (tensor.dtype, tensor.untyped_storage().nbytes())
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function(x.clone().requires_grad_())
    totals = {}
    for dtype, size in kept.values():
        totals[dtype] = totals.get(dtype, 0) + size
    return y, totals


def test_a_feed_forward_keeps_its_input_and_swiglu_inputs_in_fp8_and_nothing_else():
    n, dim, inter = 32, 64, 48
    y, kept = kept_bytes(drawn(SwiGLU(dim=dim, inter_dim=inter, precision=made())), inputs((n, dim), 0))
    numbers = n * dim + n * 2 * inter
    assert kept == {torch.float8_e4m3fn: numbers, torch.float32: 4 * numbers // TILE}
    y.float().sum().backward()


def test_experts_keep_the_same():
    m, dim, inter = 32, 64, 48
    experts = drawn(GroupedExperts(dim=dim, inter_dim=inter, n_experts=2, precision=made()))
    counts_E = torch.tensor([20, 12])
    gates_M = torch.rand(m)
    _, kept = kept_bytes(lambda x: experts(x, counts_E, gates_M), inputs((m, dim), 0))
    numbers = m * dim + m * 2 * inter
    assert kept == {
        torch.float8_e4m3fn: numbers,
        torch.float32: 4 * numbers // TILE + gates_M.nbytes,
        torch.int64: counts_E.nbytes,
    }


def test_without_holding_swiglu_inputs_its_output_is_kept_in_fp8():
    n, dim, inter = 32, 64, 48
    _, kept = kept_bytes(
        drawn(SwiGLU(dim=dim, inter_dim=inter, precision=made(save_swiglu_inputs=False))), inputs((n, dim), 0)
    )
    assert kept[torch.float8_e4m3fn] == n * dim + n * inter


@pytest.mark.parametrize("weighted", [False, True])
def test_swiglu_backward_uses_what_the_codes_stand_for(weighted):
    gate_up, dy = inputs((8, 2 * TILE), 1), inputs((8, TILE), 2)
    weights = torch.rand(8, generator=torch.Generator().manual_seed(3)).requires_grad_() if weighted else None
    leaf, exact = gate_up.clone().requires_grad_(), held_values(gate_up).requires_grad_()
    y = made().swiglu(leaf, weights)
    y.backward(dy)
    exact_weights = torch.ones(8) if weights is None else weights.detach().clone().requires_grad_()
    silu_product(exact, exact_weights).backward(dy.double())
    assert torch.equal(y, made(save_swiglu_inputs=False).swiglu(gate_up, weights)), "y comes from the inputs themselves"
    assert torch.allclose(leaf.grad.double(), exact.grad, rtol=2**-7, atol=1e-6)
    if weights is not None:
        assert torch.allclose(weights.grad, exact_weights.grad, rtol=1e-4, atol=1e-4)


def held_values(gate_up):
    """What the codes of [g ; u] stand for: g and u are rows of their own, of one tile here."""
    return torch.from_numpy(reference.quantise(fp64(gate_up).reshape(-1, TILE), "E4M3", 1, TILE)[2]).view_as(gate_up)


def silu_product(gate_up, weights):
    gate, up = gate_up.chunk(2, -1)
    return torch.nn.functional.silu(gate) * up * weights.unsqueeze(-1)


def test_the_down_projection_computes_its_input_again():
    """Its weight's gradient is that of a layer given silu(g) u w of the held g and u."""
    precision = made()
    layer = drawn(precision.linear(TILE, 8, role="ffn_down"))
    gate_up, dy = inputs((24, 2 * TILE), 1), inputs((24, 8), 2)
    weights = torch.rand(24, generator=torch.Generator().manual_seed(3))
    layer(precision.swiglu(gate_up.requires_grad_(), weights)).backward(dy)
    again = silu_product(held_values(gate_up).float(), weights).bfloat16()
    x_wgrad = reference.quantise(fp64(again), "E4M3", TILE, 1)[2]
    dy_wgrad = reference.quantise(fp64(dy), "E4M3", TILE, 1)[2]
    assert_within(layer.weight.grad, Products.product(dy_wgrad.T, x_wgrad))


def test_roles_left_out_compute_in_bf16():
    precision = made(roles=["ffn_down"])
    assert type(precision.linear(16, 16, role="ffn_gate_up")) is CastLinear
    assert type(precision.linear(16, 16, role="head")) is CastLinear
    grouped = precision.grouped_linear(2, 16, 16, role="expert_down", grouped_mm=grouped_mm)
    assert type(grouped) is CastGroupedLinear
    assert type(made().linear(16, 16, role="head")) is CastLinear, "never the head"


def test_swiglu_inputs_are_held_for_the_roles_in_fp8_alone():
    gate_up, gates = inputs((8, 2 * TILE), 1).requires_grad_(), torch.rand(8)
    precision = made(roles=["expert_down"])
    assert origin_of(precision.swiglu(gate_up)) is None, "of a dense feed-forward, in BF16"
    y = precision.swiglu(gate_up, gates)
    assert origin_of(y) is not None
    assert origin_of(2 * y) is None
    assert origin_of(y.mul_(2)) is None, "the codes no longer stand for it"


def test_a_held_weight_is_quantised_once_and_gives_the_same(monkeypatch):
    layer = drawn(made().linear(24, 40, role="ffn_gate_up"))
    x, dy = inputs((50, 24), 3).float(), inputs((50, 40), 4)
    expected = results(layer, x, dy)
    layer.weight.grad = None
    quantised = []
    original = layer.factor
    monkeypatch.setattr(layer, "factor", lambda name, *more: quantised.append(name) or original(name, *more))
    with cached_weight_casts(layer):
        for backward in (1, 2):
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            y.backward(dy)
            assert torch.equal(y, expected[0])
            assert torch.equal(leaf.grad, expected[1])
            assert torch.equal(layer.weight.grad, backward * expected[2])
    assert [name for name in quantised if name.startswith("w_")] == ["w_fprop"], "Dgrad reads the same blocks"
    with torch.no_grad():
        layer.weight.mul_(2)
    assert torch.equal(layer(x), 2 * expected[0]), "what was held is forgotten"


def test_a_frozen_weight_passes_the_gradient_on():
    layer = drawn(made().linear(24, 40, role="ffn_gate_up")).requires_grad_(False)
    x, dy = inputs((50, 24), 3).float(), inputs((50, 40), 4).float()
    leaf = x.clone().requires_grad_()
    layer(leaf).backward(dy.bfloat16())
    assert layer.weight.grad is None
    assert leaf.grad is not None
    layer.requires_grad_(True)
    assert torch.equal(results(layer, x, dy.bfloat16())[1], leaf.grad)


@pytest.mark.parametrize(
    "settings",
    [{"power_of_two_scales": True}, {"activation_grad_blocks": True}, {"attention_out_format": "E4M3"},
     {"fp8_dispatch": False}, {"save_swiglu_inputs": False}, {"tile": 128}],
)  # fmt: skip
def test_every_setting_conforms(settings):
    check_precision(lambda: made(**settings))


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tile": 0}, "precision.tile=0"),
        ({"amax_floor": 0.0}, "amax_floor"),
        ({"roles": ["head"]}, "precision.roles: must not include head"),
    ],
)
def test_settings_that_cannot_be(settings, words):
    with pytest.raises(InstantiationException, match=words):
        made(**settings)
