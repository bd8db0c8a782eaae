"""Figures in the report of a study."""

import math

import pytest

from dsv3.reporting.paired import Difference
from dsv3.study.contents import with_error


@pytest.mark.parametrize(
    ("seeds", "mean", "half", "written"),
    [
        (3, -2.14e-5, 0.012, "-0.000 ± 0.012"),
        (3, 0.000532, 0.0045, "+0.0005 ± 0.0045"),
        (3, 0.16123, 1.24, "+0.2 ± 1.2"),
        (3, 273.4, 2934.6, "+273 ± 2,935"),
        (3, 0.0, 0.0, "+0"),
        (1, 0.01234, math.inf, "+0.0123"),
    ],
)
def test_a_difference_has_the_digits_of_its_error(seeds: int, mean: float, half: float, written: str) -> None:
    assert with_error(Difference(seeds, mean, mean - half, mean + half, 0.1)) == written
