"""Rounding to small formats, against torch's casts and against a list of all their numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.precision.formats import E4M3, E5M2, E5M6, FORMATS, round_to, round_up_to_power_of_two
from tests.plugins.precision import reference

EVERY_BF16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()


def same_bits(a, b):
    """Equal to the sign of zero; any NaN is like any other."""
    return bool(((a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())).all())


def around_midpoints(format):
    """Every number of the format, every midpoint of neighbours, and the FP32 numbers next to them."""
    table = reference.numbers(format.name)
    points = np.concatenate([table, (table[1:] + table[:-1]) / 2]).astype(np.float32)
    near = np.concatenate([points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(0))])
    return torch.from_numpy(np.concatenate([near, -near]))


@pytest.mark.parametrize("format", [E4M3, E5M2])
def test_rounds_as_torch_casts(format):
    for x in (EVERY_BF16, around_midpoints(format), torch.randn(100_000) * torch.exp2(torch.randn(100_000) * 6)):
        cast = x.clamp(-format.largest, format.largest).to(format.dtype).float()
        assert same_bits(round_to(x, format), cast)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_rounds_to_the_nearest_of_its_numbers(format):
    table = reference.numbers(format.name)
    x = around_midpoints(format)
    x = x[x.isfinite()]
    expected = np.copysign(table[reference.encode(x.double().numpy(), format.name)], x.numpy())
    assert same_bits(round_to(x, format), torch.from_numpy(expected).float())
    kept = torch.from_numpy(table).float()
    assert same_bits(round_to(kept, format), kept)
    assert same_bits(kept.to(format.dtype).float(), kept), "the dtype that holds the codes holds every number"


def test_sizes_of_the_formats():
    assert len(reference.numbers("E4M3")) == 127
    for format in (E4M3, E5M2):
        info = torch.finfo(format.dtype)
        assert (format.largest, 2.0**format.smallest_exponent) == (info.max, info.smallest_normal)
    assert (E4M3.overflow, E5M2.overflow, E5M6.overflow) == (464.0, 61440.0, 65280.0)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_saturates_and_keeps_nan(format):
    found = round_to(torch.tensor([1e30, -1e30, float("inf"), float("-inf"), float("nan")]), format)
    assert found[:4].tolist() == [format.largest, -format.largest] * 2
    assert found[4].isnan()


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.floats(min_value=2.0**-100, max_value=2.0**100, width=32))
def test_rounds_up_to_powers_of_two(x):
    mantissa, exponent = np.frexp(np.float32(x))
    assert round_up_to_power_of_two(torch.tensor([x])).item() == 2.0 ** (exponent - (mantissa == 0.5))


def test_no_power_of_two_hides_what_is_not_finite():
    assert round_up_to_power_of_two(torch.tensor([float("inf"), float("nan")])).isnan().all()
