"""Number theory: divisors, remainders, digits."""

import math
from random import Random

from dsv3.verifiers.competition.template import Parameters, Template

FIELD = "number theory"


def _two(low: int, high: int, draws: Random) -> Parameters:
    """Two different numbers, the smaller first: a problem has one wording."""
    a, b = sorted(draws.sample(range(low, high), 2))
    return {"a": a, "b": b}


def _coins(draws: Random) -> Parameters | None:
    pair = _two(3, 40, draws)
    return pair if math.gcd(pair["a"], pair["b"]) == 1 else None


def _remainders(draws: Random) -> Parameters | None:
    p, q = sorted(draws.sample(range(3, 32), 2))
    return {"p": p, "q": q, "r": draws.randrange(p), "s": draws.randrange(q)} if math.gcd(p, q) == 1 else None


def _smallest_with_remainders(p: int, q: int, r: int, s: int) -> int:
    found = r + p * ((s - r) * pow(p, -1, q) % q)
    return found or p * q


def _divisors(n: int) -> int:
    count = 1
    for prime in range(2, n + 1):
        power = 0
        while n % prime == 0:
            n, power = n // prime, power + 1
        count *= power + 1
        if n == 1:
            break
    return count


TEMPLATES = (
    Template(
        "gcd",
        FIELD,
        1,
        "What is the greatest common divisor of {a} and {b}?",
        lambda draws: _two(12, 300, draws),
        lambda a, b: math.gcd(a, b),
    ),
    Template(
        "digit_sum_of_product",
        FIELD,
        1,
        "What is the sum of the digits of {a} times {b}?",
        lambda draws: _two(12, 100, draws),
        lambda a, b: sum(map(int, str(a * b))),
    ),
    Template(
        "divisors",
        FIELD,
        2,
        "How many positive divisors does {n} have?",
        lambda draws: {"n": draws.randrange(100, 5000)},
        _divisors,
    ),
    Template(
        "power_remainder",
        FIELD,
        2,
        "What is the remainder when {a} to the power of {b} is divided by {m}?",
        lambda draws: {"a": draws.randrange(2, 20), "b": draws.randrange(10, 100), "m": draws.randrange(7, 1000)},
        lambda a, b, m: pow(a, b, m),
    ),
    Template(
        "trailing_zeros",
        FIELD,
        2,
        "In how many zeros does the decimal form of {n}! end?",
        lambda draws: {"n": draws.randrange(20, 2000)},
        lambda n: sum(n // 5**power for power in range(1, 10)),
    ),
    Template(
        "coins",
        FIELD,
        3,
        "A country has coins of {a} and {b} cents only. What is the largest amount, in cents, that cannot be paid "
        "exactly?",
        _coins,
        lambda a, b: a * b - a - b,
    ),
    Template(
        "remainders",
        FIELD,
        3,
        "What is the smallest positive integer that leaves the remainder {r} when divided by {p} and the remainder {s} "
        "when divided by {q}?",
        _remainders,
        _smallest_with_remainders,
    ),
)
