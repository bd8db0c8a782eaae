"""Quantisation in tiles, bit for bit against the recipe in FP64."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.precision.formats import E4M3, E5M2, E5M6
from plugins.precision.quantiser import Groups, Quantiser, matrix_of
from tests.plugins.precision import reference

ROW = Quantiser(format=E4M3, rows=1, columns=16, power_of_two=False, amax_floor=1e-4, compiled=False)
COLUMN, BLOCK = replace(ROW, rows=16, columns=1), replace(ROW, rows=16)


def hard(shape, seed):
    """Rows of very different sizes, zeros, FP32's own subnormal numbers, numbers near FP32's largest."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp2(torch.randn(shape, generator=generator) * 5)
    x[::5] *= 1e-6
    x[1::5] = 0
    x[2::7, ::3] = 1e-40
    x[3::11, :4] = 2e38
    x[:, -1] *= 1e-3
    return x


def bits(held, format, shape):
    """Codes of what is held, as integers, in the matrix's places."""
    integer = torch.uint8 if format.dtype.itemsize == 1 else torch.int16
    return matrix_of(held.codes.contiguous().view(integer), shape).numpy()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from([ROW, COLUMN, BLOCK, replace(ROW, columns=None), replace(BLOCK, rows=None)]),
    format=st.sampled_from([E4M3, E5M2]),
    power_of_two=st.booleans(),
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_codes_and_scales_equal_the_recipe_in_fp64(kind, format, power_of_two, shape, seed, dtype):
    quantiser = replace(kind, format=format, power_of_two=power_of_two)
    x = hard(shape, seed).to(dtype)
    rows, columns = quantiser.rows or shape[0], quantiser.columns or shape[1]
    codes, scales, values = reference.quantise(x.double(), format.name, rows, columns, power_of_two=power_of_two)
    found, held = quantiser.values_and_held(x, torch.float32)
    assert (bits(held, format, shape) == codes).all()
    assert (matrix_of(held.scales.expand_as(held.codes), shape).double().numpy() == scales).all()
    assert (found.double().numpy() == values).all()
    assert torch.equal(quantiser.values(x, torch.float32), found)
    assert torch.equal(quantiser.decoded(held, shape, torch.float32), found)
    alone = quantiser.held(x)
    assert torch.equal(alone.codes.float(), held.codes.float())
    assert torch.equal(alone.scales, held.scales)


def test_e5m6_is_held_exactly_in_bf16():
    quantiser = replace(ROW, format=E5M6, power_of_two=True)
    x = hard((33, 40), 1)
    _, _, values = reference.quantise(x.double(), "E5M6", 1, 16, power_of_two=True)
    found, held = quantiser.values_and_held(x, torch.float32)
    assert (found.double().numpy() == values).all()
    assert torch.equal(quantiser.decoded(held, x.shape, torch.float32), found)
    assert torch.equal(quantiser.values(x, torch.bfloat16).float(), found), "and its values are exact in BF16"


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from([ROW, COLUMN, BLOCK, replace(COLUMN, rows=None)]),
    counts=st.lists(st.sampled_from([0, 1, 3, 15, 16, 17, 40]), min_size=1, max_size=6).filter(any),
    seed=st.integers(0, 10_000),
)
def test_no_tile_reaches_into_another_group(kind, counts, seed):
    x = hard((sum(counts), 20), seed)
    found = kind.values(x, torch.float32, groups=Groups(torch.tensor(counts), len(x)))
    filled = [count for count in counts if count]
    expected = reference.quantise_groups(x.double(), filled, "E4M3", kind.rows or len(x), kind.columns)
    assert (found.double().numpy() == expected).all()


def test_each_expert_weight_has_its_own_blocks():
    x = torch.stack([hard((20, 24), seed) for seed in range(3)])
    found = BLOCK.values(x, torch.float32)
    assert torch.equal(found, torch.stack([BLOCK.values(matrix, torch.float32) for matrix in x]))


def test_the_floor_of_amax():
    """Below it the scale stays, and numbers under half the smallest step become zero."""
    x = torch.full((1, 16), 1e-5)
    held = ROW.held(x)
    assert held.scales.item() == np.float32(np.float32(1e-4) / 448)
    step = held.scales.item() * 2**-9
    edge = torch.tensor([[0.49 * step, 0.51 * step]])
    assert (ROW.values(edge, torch.float32) != 0).tolist() == [[False, True]]
    assert (replace(ROW, amax_floor=1e-12).values(edge, torch.float32) != 0).all()


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize(
    ("kind", "tile"), [(ROW, np.s_[3:4, 16:32]), (COLUMN, np.s_[:16, 20:21]), (BLOCK, np.s_[:16, 16:32])]
)
def test_what_is_not_finite_fills_its_tile_with_nan(kind, tile, power_of_two, bad):
    x = torch.ones(32, 32)
    x[3, 20] = bad
    quantiser = replace(kind, power_of_two=power_of_two)
    expected = torch.zeros(32, 32, dtype=torch.bool)
    expected[tile] = True
    assert torch.equal(quantiser.values(x, torch.float32).isnan(), expected)
    groups = Groups(torch.tensor([16, 16]), 32)
    assert torch.equal(quantiser.values(x, torch.float32, groups=groups).isnan(), expected)


def test_a_given_scale_saturates():
    scale = torch.tensor(0.5)  # 100 / 0.5 lies half way between 192 and 208
    x = torch.tensor([[1000.0, -1000.0, 100.0, 0.0]])
    assert ROW.values(x, torch.float32, scale=scale).tolist() == [[224.0, -224.0, 96.0, 0.0]]


@pytest.mark.slow
def test_compiled_equals_eager():
    x = hard((256, 96), 3)
    x[40, 7], x[80, 9] = float("nan"), float("inf")
    groups = Groups(torch.tensor([100, 0, 30, 126]), 256)
    for kind in (ROW, COLUMN, BLOCK, replace(ROW, power_of_two=True), replace(ROW, format=E5M6)):
        for dtype in (torch.float32, torch.bfloat16):
            compiled = replace(kind, compiled=True)
            for given_groups in (None, groups):
                one, other = (q.values(x.to(dtype), torch.float32, groups=given_groups) for q in (kind, compiled))
                assert torch.equal(one.nan_to_num(-1), other.nan_to_num(-1))
            held, other = kind.held(x.to(dtype)), compiled.held(x.to(dtype))
            assert torch.equal(held.codes.float().nan_to_num(-1), other.codes.float().nan_to_num(-1))
            assert torch.equal(held.scales.nan_to_num(-1), other.scales.nan_to_num(-1))
