"""Combinatorics: choosing, arranging, colouring."""

import math
from random import Random

from dsv3.verifiers.competition.template import Parameters, Template

FIELD = "combinatorics"


def _choice(draws: Random) -> Parameters:
    return {"n": draws.randrange(5, 40), "k": draws.randrange(2, 6)}


def _letters(draws: Random) -> Parameters:
    return dict(zip("abc", sorted((draws.randrange(1, 8) for _ in range(3)), reverse=True)))


def _multiples(draws: Random) -> Parameters:
    a, b = sorted(draws.sample(range(2, 14), 2))
    return {"n": draws.randrange(50, 1000), "a": a, "b": b}


def _path(draws: Random) -> Parameters:
    m, n = draws.randrange(3, 8), draws.randrange(3, 8)
    return {"m": m, "n": n, "p": draws.randrange(1, m), "q": draws.randrange(1, n)}


def _paths_around(m: int, n: int, p: int, q: int) -> int:
    through = math.comb(p + q, p) * math.comb(m + n - p - q, m - p)
    return math.comb(m + n, m) - through


def _colours(draws: Random) -> Parameters | None:
    low, high = draws.randrange(2, 400), draws.randrange(20, 2000)
    return {"low": low, "high": high} if high > 2 * low else None


def most_yellow(low: int, high: int) -> int:
    """Yellow numbers are at most half of the largest, and no two of them add up to a third.

    Of those from `low` to m, the largest that is taken, M, forbids one of i and M - i: ceil(M / 2) remain. All of them
    may be yellow where even the smallest two add up to more than m.

    The first problem of the AI Mathematical Olympiad's sample, blue and yellow numbers of three digits:

    >>> most_yellow(111, 999)
    250
    """
    m = high // 2
    return (m + 1) // 2 if m >= 2 * low - 1 else m - low + 1


TEMPLATES = (
    Template(
        "committee",
        FIELD,
        1,
        "In how many ways can a committee of {k} be chosen from {n} people?",
        _choice,
        lambda n, k: math.comb(n, k),
    ),
    Template(
        "handshakes_of_groups",
        FIELD,
        1,
        "At a meeting of {a} teachers and {b} parents every teacher shakes hands with every parent, and the parents "
        "shake hands with each other. How many handshakes are there?",
        lambda draws: {"a": draws.randrange(2, 20), "b": draws.randrange(2, 35)},
        lambda a, b: a * b + b * (b - 1) // 2,
    ),
    Template(
        "letters",
        FIELD,
        2,
        "The letters of a row are {a} times A, {b} times B and {c} times C. What is the remainder when the number of "
        "their different orders is divided by 1000?",
        _letters,
        lambda a, b, c: math.comb(a + b + c, a) * math.comb(b + c, b) % 1000,
    ),
    Template(
        "multiples",
        FIELD,
        2,
        "How many of the integers from 1 to {n} are divisible by {a} or by {b}?",
        _multiples,
        lambda n, a, b: n // a + n // b - n // math.lcm(a, b),
    ),
    Template(
        "no_neighbours",
        FIELD,
        3,
        "{n} chairs stand in a row. In how many ways can {k} of them be chosen so that no two of the chosen chairs are "
        "next to each other?",
        _choice,
        lambda n, k: math.comb(n - k + 1, k) if n >= 2 * k - 1 else 0,
    ),
    Template(
        "paths_around",
        FIELD,
        3,
        "A robot walks on a grid from (0, 0) to ({m}, {n}); every step goes one to the right or one up. How many ways "
        "are there that do not pass through ({p}, {q})?",
        _path,
        _paths_around,
    ),
    Template(
        "blue_and_yellow",
        FIELD,
        3,
        "Each of the numbers from {low} to {high} is coloured blue or yellow in such a way that the sum of any two "
        "(not necessarily different) yellow numbers is equal to a blue number. What is the largest possible number of "
        "yellow numbers?",
        _colours,
        most_yellow,
    ),
)
