"""The recipe again, in numpy's FP64 and one tile at a time, from the definition of the formats: an oracle.

What a GPU holds in FP32 (scales, scaled numbers before they are rounded to FP8, code * scale) is rounded to FP32 here.
"""

import numpy as np

PARAMETERS = {"E4M3": (4, 3, 7, 448.0), "E5M2": (5, 2, 15, 57344.0), "E5M6": (5, 6, 15, 65024.0)}
"""Exponent bits, mantissa bits, bias, largest number."""


def numbers(name):
    """All numbers of the format that are 0 or more, ascending: their place is their code."""
    exponent_bits, mantissa_bits, bias, largest = PARAMETERS[name]
    found = []
    for exponent in range(2**exponent_bits):
        for mantissa in range(2**mantissa_bits):
            fraction = mantissa / 2**mantissa_bits
            found.append(2.0 ** (1 - bias) * fraction if exponent == 0 else 2.0 ** (exponent - bias) * (1 + fraction))
    return np.array([number for number in found if number <= largest])


def encode(x, name):
    """Codes (without the sign) of the nearest numbers, ties to the even code, saturating; x in FP64, finite."""
    table = numbers(name)
    magnitude = np.abs(x)
    above = np.searchsorted(table, magnitude).clip(0, len(table) - 1)
    below = (above - 1).clip(0)
    to_above, to_below = table[above] - magnitude, magnitude - table[below]
    take_below = (to_below < to_above) | ((to_below == to_above) & (below % 2 == 0))
    return np.where(take_below & (above > 0), below, above)


def quantise(x, name, rows, columns, *, power_of_two=False, floor=1e-4):
    """(codes with the sign's bit on top, scales, values) of a matrix; scales and values for every element, FP64."""
    x = np.asarray(x, dtype=np.float64)
    table, largest = numbers(name), PARAMETERS[name][3]
    sign_bit = 2 ** sum(PARAMETERS[name][:2])
    codes, scales = np.zeros(x.shape, dtype=np.int64), np.zeros(x.shape)
    for top in range(0, x.shape[0], rows):
        for left in range(0, x.shape[1], columns):
            here = np.s_[top : top + rows, left : left + columns]
            amax = max(np.abs(x[here]).max(), np.float64(np.float32(floor)))
            scale = np.float64(np.float32(amax / largest))
            if power_of_two:
                mantissa, exponent = np.frexp(scale)
                scale = 2.0 ** (exponent - 1 if mantissa == 0.5 else exponent)
            scaled = np.float64(np.float32(x[here] / scale))
            codes[here] = encode(scaled, name) + sign_bit * np.signbit(x[here])
            scales[here] = scale
    values = np.where(codes >= sign_bit, -1.0, 1.0) * table[codes % sign_bit] * scales
    return codes, scales, np.float64(np.float32(values))


def quantise_groups(x, counts, name, rows, columns, **settings):
    """Values of a matrix whose rows belong to groups, each quantised by itself."""
    parts = np.split(np.asarray(x, dtype=np.float64), np.cumsum(counts)[:-1])
    return np.concatenate([quantise(part, name, rows, columns, **settings)[2] for part in parts])
