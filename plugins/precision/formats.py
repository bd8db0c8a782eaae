"""Small floating-point formats and rounding to them.

With m mantissa bits, numbers of exponent E lie 2^(E - m) apart, and below the smallest normal number 2^E_min (where
subnormal numbers are) 2^(E_min - m). Rounding to the nearest of them, ties to even, is left to the FP32 adder:
c = 1.5 * 2^23 * step has `step` as its last place, so that (x + c) - c is x rounded.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

EXPONENT = 0x7F800000  # where the exponent stands in the bits of an FP32 number
MANTISSA_BITS = 23
BIAS = 127


@dataclass(frozen=True)
class Format:
    """A sign, exponents down to `smallest_exponent` (subnormal numbers below it), and `mantissa_bits`."""

    name: str
    mantissa_bits: int
    smallest_exponent: int
    largest: float
    dtype: torch.dtype  # holds every number of the format exactly

    @property
    def overflow(self) -> float:
        """The least magnitude that, were there larger numbers, would not round to `largest`: half a step above it."""
        exponent = math.frexp(self.largest)[1] - 1
        return self.largest + math.ldexp(0.5, exponent - self.mantissa_bits)


E4M3 = Format("E4M3", 3, -6, 448.0, torch.float8_e4m3fn)
E5M2 = Format("E5M2", 2, -14, 57344.0, torch.float8_e5m2)
# No torch dtype: kept in BF16. The report says no more than "E5M6"; bias and largest number are here as in E5M2.
E5M6 = Format("E5M6", 6, -14, 65024.0, torch.bfloat16)
FORMATS = {format.name: format for format in (E4M3, E5M2, E5M6)}


def round_to(x: Tensor, format: Format) -> Tensor:
    """The nearest number of `format`, ties to even; beyond `largest` it saturates; NaN stays NaN. FP32 in and out."""
    clamped = x.clamp(-format.largest, format.largest)
    exponent = (clamped.view(torch.int32) & EXPONENT).clamp_(min=(BIAS + format.smallest_exponent) << MANTISSA_BITS)
    shift = (MANTISSA_BITS - format.mantissa_bits) << MANTISSA_BITS
    half = 1 << (MANTISSA_BITS - 1)  # the mantissa of 1.5
    c = exponent.add_(shift + half).view(torch.float32)
    return clamped.add(c).sub_(c).copysign_(x)  # what rounds to zero keeps its sign


def round_up_to_power_of_two(x: Tensor) -> Tensor:
    """2^ceil(log2(x)) of positive normal FP32 numbers, exactly; infinity and NaN give NaN."""
    bits = x.view(torch.int32) + ((1 << MANTISSA_BITS) - 1)
    return (bits & EXPONENT).view(torch.float32) + (x - x)
