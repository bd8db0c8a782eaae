"""GPU hours and utilisation, and the published hours of DeepSeek-V3."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.planning.duration import days, gpu_hours, implied_mfu
from dsv3.planning.recipe import V3_PUBLISHED

positive = st.floats(1e-3, 1e15)


@given(positive, positive, positive, st.floats(0.01, 1))
def test_hours_and_mfu_are_inverse(flops: float, tokens: float, peak: float, mfu: float) -> None:
    hours = gpu_hours(flops_per_token=flops, tokens=tokens, peak=peak, mfu=mfu)
    assert implied_mfu(flops_per_token=flops, tokens=tokens, peak=peak, hours=hours) == pytest.approx(mfu)


def test_a_gpu_at_its_peak_for_an_hour() -> None:
    assert gpu_hours(flops_per_token=3600, tokens=1e12, peak=1e12, mfu=1.0) == 1.0
    assert gpu_hours(flops_per_token=3600, tokens=1e12, peak=1e12, mfu=0.25) == 4.0


def test_the_published_figures_agree_with_each_other() -> None:
    """180K hours per trillion tokens are 3.7 days on 2048 GPUs, and 14.8 times as many are the 2664K."""
    p = V3_PUBLISHED
    assert p.gpu_hours_per_trillion_tokens * p.tokens / 1e12 == pytest.approx(p.gpu_hours)
    assert days(p.gpu_hours_per_trillion_tokens, p.gpus) == pytest.approx(3.66, abs=0.01)
