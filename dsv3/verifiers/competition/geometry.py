"""Geometry: lengths, areas, lattice points, solids."""

import math
from random import Random

from dsv3.verifiers.competition.template import Parameters, Template

FIELD = "geometry"


def _rectangle(draws: Random) -> Parameters:
    a, b = draws.randrange(2, 40), draws.randrange(2, 40)
    return {"a": max(a, b), "area": a * b}


def _right_triangle(draws: Random) -> Parameters | None:
    m, n, k = draws.randrange(2, 12), draws.randrange(1, 11), draws.randrange(1, 10)
    if m <= n or math.gcd(m, n) > 1 or (m - n) % 2 == 0:
        return None
    a, b = sorted((k * (m * m - n * n), 2 * k * m * n))
    return {"a": a, "b": b}


def _triangle(draws: Random) -> Parameters | None:
    x1, y1, x2, y2 = (draws.randrange(0, 30) for _ in range(4))
    return {"x1": x1, "y1": y1, "x2": x2, "y2": y2} if x1 * y2 != x2 * y1 else None


def _chords(draws: Random) -> Parameters:
    a, b, c = draws.randrange(2, 30), draws.randrange(2, 30), draws.randrange(2, 30)
    return {"a": a * c, "b": b, "c": c}  # so that the fourth part is a whole number


def _legs(draws: Random) -> Parameters:
    a, b = sorted((draws.randrange(3, 60), draws.randrange(3, 60)))
    return {"a": a, "b": b}


def _inside(a: int, b: int) -> int:
    """Pick's theorem: area = inside + boundary / 2 - 1."""
    return (a * b - (a + b + math.gcd(a, b)) + 2) // 2


def _sides(draws: Random) -> Parameters:
    return dict(zip("abc", sorted(draws.randrange(3, 30) for _ in range(3))))


def _squares_in_grid(a: int, b: int) -> int:
    return sum((a - side) * (b - side) for side in range(min(a, b)))


TEMPLATES = (
    Template(
        "perimeter",
        FIELD,
        1,
        "A rectangle has the area {area}, and one of its sides is {a} long. What is its perimeter?",
        _rectangle,
        lambda a, area: 2 * (a + area // a),
    ),
    Template(
        "hypotenuse",
        FIELD,
        1,
        "The legs of a right triangle are {a} and {b} long. How long is its hypotenuse?",
        _right_triangle,
        lambda a, b: math.isqrt(a * a + b * b),
    ),
    Template(
        "twice_the_area",
        FIELD,
        2,
        "A triangle has the corners (0, 0), ({x1}, {y1}) and ({x2}, {y2}). What is twice its area?",
        _triangle,
        lambda x1, y1, x2, y2: abs(x1 * y2 - x2 * y1),
    ),
    Template(
        "chords",
        FIELD,
        2,
        "Two chords of a circle cross in P. P divides one of them into parts of length {a} and {b}, and one part of "
        "the other is {c} long. How long is its other part?",
        _chords,
        lambda a, b, c: a * b // c,
    ),
    Template(
        "two_painted_faces",
        FIELD,
        2,
        "A block of {a} by {b} by {c} is painted on all sides and cut into unit cubes. How many of them have exactly "
        "two painted faces?",
        _sides,
        lambda a, b, c: 4 * (a + b + c - 6),
    ),
    Template(
        "points_inside",
        FIELD,
        3,
        "How many points with integer coordinates lie strictly inside the triangle with the corners (0, 0), ({a}, 0) "
        "and (0, {b})?",
        _legs,
        _inside,
    ),
    Template(
        "squares_in_grid",
        FIELD,
        3,
        "How many squares of any size, with sides along the lines, are there in a grid of {a} by {b} unit squares?",
        _legs,
        _squares_in_grid,
    ),
)
