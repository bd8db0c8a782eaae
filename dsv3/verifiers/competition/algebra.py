"""Algebra: equations, series, recurrences."""

from random import Random

from dsv3.verifiers.competition.template import Parameters, Template

FIELD = "algebra"


def _linear(draws: Random) -> Parameters:
    a, x, b = draws.randrange(2, 20), draws.randrange(1, 100), draws.randrange(1, 100)
    return {"a": a, "b": b, "c": a * x + b}


def _series(draws: Random) -> Parameters:
    return {"first": draws.randrange(1, 20), "step": draws.randrange(2, 10), "n": draws.randrange(4, 16)}


def _quadratic(draws: Random) -> Parameters | None:
    p, q = draws.randrange(5, 32), draws.randrange(1, 100)
    return {"p": p, "q": q} if p * p > 4 * q else None


def _sum_and_difference(draws: Random) -> Parameters:
    x, y = sorted(draws.sample(range(1, 40), 2), reverse=True)
    return {"s": x + y, "d": x - y}


def _recurrence(draws: Random) -> Parameters:
    return {
        "first": draws.randrange(1, 10),
        "second": draws.randrange(1, 10),
        "p": draws.randrange(1, 5),
        "q": draws.randrange(1, 5),
        "n": draws.randrange(8, 20),
    }


def _recurrence_remainder(first: int, second: int, p: int, q: int, n: int) -> int:
    a, b = first, second
    for _ in range(n - 2):
        a, b = b, (p * b + q * a) % 1000
    return b


def _powers(draws: Random) -> Parameters:
    return {"s": draws.randrange(1, 12), "p": draws.randrange(1, 30)}


TEMPLATES = (
    Template(
        "linear",
        FIELD,
        1,
        "Solve for x: {a}x + {b} = {c}.",
        _linear,
        lambda a, b, c: (c - b) // a,
    ),
    Template(
        "arithmetic_series",
        FIELD,
        1,
        "An arithmetic sequence begins with {first} and grows by {step} from term to term. What is the sum of its "
        "first {n} terms?",
        _series,
        lambda first, step, n: n * (2 * first + (n - 1) * step) // 2,
    ),
    Template(
        "squares_of_roots",
        FIELD,
        2,
        "What is the sum of the squares of the roots of x^2 - {p}x + {q} = 0?",
        _quadratic,
        lambda p, q: p * p - 2 * q,
    ),
    Template(
        "product_of_two",
        FIELD,
        2,
        "Two numbers have the sum {s} and the difference {d}. What is their product?",
        _sum_and_difference,
        lambda s, d: (s * s - d * d) // 4,
    ),
    Template(
        "recurrence",
        FIELD,
        3,
        "A sequence begins with a_1 = {first} and a_2 = {second}, and a_n = {p} a_(n-1) + {q} a_(n-2) from then on. "
        "What is the remainder when a_{n} is divided by 1000?",
        _recurrence,
        _recurrence_remainder,
    ),
    Template(
        "cubes_of_two",
        FIELD,
        3,
        "Two numbers x and y, real or complex, satisfy x + y = {s} and xy = {p}. What is the absolute value of "
        "x^3 + y^3?",
        _powers,
        lambda s, p: abs(s**3 - 3 * s * p),
    ),
)
