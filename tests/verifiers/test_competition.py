"""Competition problems: every answer by brute force, splits that share nothing, extraction that cannot be gamed."""

import functools
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from dsv3.verifiers import final_integer
from dsv3.verifiers.competition import LEVELS, TEMPLATES, Problem, drawn, split_of
from dsv3.verifiers.competition.combinatorics import most_yellow

BY_NAME = {template.name: template for template in TEMPLATES}
CHECKED = 12
"""Problems of each template that are counted out."""


def paths(m: int, n: int, p: int, q: int) -> int:
    ways = {(0, 0): 1}
    for x, y in itertools.product(range(m + 1), range(n + 1)):
        if (x, y) != (0, 0):
            ways[x, y] = 0 if (x, y) == (p, q) else ways.get((x - 1, y), 0) + ways.get((x, y - 1), 0)
    return ways[m, n]


@functools.cache
def orders(*counts: int) -> int:
    """Of letters, the last one first."""
    if sum(counts) == 0:
        return 1
    smaller = [[c - (i == j) for j, c in enumerate(counts)] for i in range(len(counts)) if counts[i]]
    return sum(orders(*each) for each in smaller)


@functools.cache
def rows_of_chairs(n: int, k: int) -> int:
    """Chair by chair: taken, or not."""
    if k == 0:
        return 1
    return 0 if n <= 0 else rows_of_chairs(n - 1, k) + rows_of_chairs(n - 2, k - 1)


@functools.cache
def committees(n: int, k: int) -> int:
    return 1 if k in (0, n) else 0 if k > n else committees(n - 1, k) + committees(n - 1, k - 1)


def recurrence(first: int, second: int, p: int, q: int, n: int) -> int:
    terms = [first, second]
    while len(terms) < n:
        terms.append(p * terms[-1] + q * terms[-2])
    return terms[n - 1] % 1000


def cubes(s: int, p: int) -> int:
    root = (s * s - 4 * p) ** 0.5
    return round(abs(((s + root) / 2) ** 3 + ((s - root) / 2) ** 3))


def inside(a: int, b: int) -> int:
    return sum(b * x + a * y < a * b for x in range(1, a) for y in range(1, b))


def painted(a: int, b: int, c: int) -> int:
    cubes_at = itertools.product(range(a), range(b), range(c))
    faces = (sum((v == 0) + (v == size - 1) for v, size in zip(cube, (a, b, c), strict=True)) for cube in cubes_at)
    return sum(count == 2 for count in faces)


def unpayable(a: int, b: int) -> int:
    payable = {i * a + j * b for i in range(b + 1) for j in range(a + 1)}
    return max(n for n in range(a * b) if n not in payable)


def squares(a: int, b: int) -> int:
    corners = itertools.product(range(a), range(b), range(1, max(a, b) + 1))
    return sum(x + side <= a and y + side <= b for x, y, side in corners)


def digits(a: int, b: int) -> int:
    n, total = a * b, 0
    while n:
        n, total = n // 10, total + n % 10
    return total


def factorial_zeros(n: int) -> int:
    found, zeros = math.factorial(n), 0
    while found % 10 == 0:
        found, zeros = found // 10, zeros + 1
    return zeros


BRUTE: dict[str, Callable[..., int]] = {
    "gcd": lambda a, b: max(d for d in range(1, a + 1) if a % d == b % d == 0),
    "digit_sum_of_product": digits,
    "divisors": lambda n: sum(n % d == 0 for d in range(1, n + 1)),
    "power_remainder": lambda a, b, m: a**b % m,
    "trailing_zeros": factorial_zeros,
    "coins": unpayable,
    "remainders": lambda p, q, r, s: next(n for n in range(1, p * q + 1) if n % p == r and n % q == s),
    "committee": committees,
    "handshakes_of_groups": lambda a, b: sum(j >= a for i, j in itertools.combinations(range(a + b), 2)),
    "letters": lambda a, b, c: orders(a, b, c) % 1000,
    "multiples": lambda n, a, b: sum(i % a == 0 or i % b == 0 for i in range(1, n + 1)),
    "no_neighbours": rows_of_chairs,
    "paths_around": paths,
    "linear": lambda a, b, c: next(x for x in range(1000) if a * x + b == c),
    "arithmetic_series": lambda first, step, n: sum(first + i * step for i in range(n)),
    "squares_of_roots": lambda p, q: round(sum(((p + sign * (p * p - 4 * q) ** 0.5) / 2) ** 2 for sign in (1, -1))),
    "product_of_two": lambda s, d: next(y * (y + d) for y in range(1000) if 2 * y + d == s),
    "recurrence": recurrence,
    "cubes_of_two": cubes,
    "perimeter": lambda a, area: next(2 * (a + b) for b in range(1, 1000) if a * b == area),
    "hypotenuse": lambda a, b: next(c for c in range(1, 1000) if c * c == a * a + b * b),
    "twice_the_area": lambda x1, y1, x2, y2: round(
        2 * abs(math.hypot(x1, y1) * math.hypot(x2, y2) * math.sin(math.atan2(y1, x1) - math.atan2(y2, x2)) / 2)
    ),
    "chords": lambda a, b, c: next(d for d in range(1, 1000) if a * b == c * d),
    "two_painted_faces": painted,
    "points_inside": inside,
    "squares_in_grid": squares,
}


def parameters_of(name: str, problem: str) -> dict[str, int]:
    """Read out of the problem's text again."""
    text = BY_NAME[name].text
    names = re.findall(r"\{(\w+)\}", text)
    pieces = enumerate(re.split(r"\{(\w+)\}", text))
    pattern = "".join("([0-9]+)" if i % 2 else re.escape(piece) for i, piece in pieces)
    match = re.fullmatch(pattern, problem)
    assert match is not None
    return {key: int(value) for key, value in zip(names, match.groups(), strict=True)}


def test_there_are_templates_of_four_fields_and_three_levels() -> None:
    assert len(TEMPLATES) >= 20
    assert len(BY_NAME) == len(TEMPLATES)
    fields = {template.field for template in TEMPLATES}
    assert fields == {"number theory", "combinatorics", "algebra", "geometry"}
    assert {(each.field, each.level) for each in TEMPLATES} == {(field, level) for field in fields for level in LEVELS}


@pytest.mark.parametrize("name", sorted(BRUTE))
def test_answers_are_those_of_brute_force(name: str) -> None:
    problems = list(drawn([BY_NAME[name]], "test", each=CHECKED))
    assert len(problems) == CHECKED
    for each in problems:
        assert each.answer == BRUTE[name](**parameters_of(name, each.problem)), each.problem
        assert 0 <= each.answer <= 999


def test_every_template_is_proven() -> None:
    assert {*BRUTE, "blue_and_yellow"} == set(BY_NAME)


def test_blue_and_yellow_numbers_by_trying_all_colourings() -> None:
    """The seed's problem, and every smaller one that can be searched."""
    assert most_yellow(111, 999) == 250
    for low, high in itertools.product(range(1, 7), range(13, 27)):
        if high > 2 * low:
            assert most_yellow(low, high) == most_by_search(low, high), (low, high)


def most_by_search(low: int, high: int) -> int:
    """Largest set of numbers with every sum of two of them in the range and not in the set."""
    candidates = [n for n in range(low, high + 1) if 2 * n <= high]  # n + n must be a number of the range

    def grow(at: int, taken: frozenset[int]) -> int:
        if at == len(candidates):
            return len(taken)
        n, best = candidates[at], grow(at + 1, taken)
        allowed = all(n - other not in taken for other in taken) and n + n <= high
        return max(best, grow(at + 1, taken | {n})) if allowed else best

    return grow(0, frozenset())


def test_no_problem_of_training_is_one_of_the_test() -> None:
    """Nor its parameters, whatever seed training draws with."""

    def parameters(problems: Iterable[Problem]) -> set[Any]:
        return {(each.template, *sorted(parameters_of(each.template, each.problem).items())) for each in problems}

    test = parameters(drawn(TEMPLATES, "test", each=20))
    train = parameters(each for seed in range(2) for each in drawn(TEMPLATES, "train", each=30, seed=seed))
    assert len(test) >= 20 * len(TEMPLATES) * 0.9
    assert not test & train
    assert {split_of(each.problem) for each in drawn(TEMPLATES, "train", each=5)} == {"train"}


def test_answers_do_not_follow_from_the_template() -> None:
    """The commonest answer of a template is right for less than half of its problems."""
    for template in TEMPLATES:
        answers = Counter(each.answer for each in drawn([template], "test", each=20))
        assert answers.most_common(1)[0][1] <= answers.total() / 2, template.name


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so it is \boxed{250}.", 250),
        (r"\boxed{025}", 25),
        (r"First \boxed{3}, no: \boxed{4}", 4),
        (r"\boxed{\boxed{7}}", None),
        (r"\boxed{25.0}", None),
        (r"\boxed{x = 25}", None),
        (r"\boxed{24, 25}", None),
        (r"\boxed{25} and then \boxed{", None),
        (r"\boxed{__import__('os').abort()}", None),
        (r"\boxed{5**2}", None),
        (r"\boxed{}", None),
        ("25", None),
        ("", None),
        (r"\boxed{٢٥}", None),
        (r"\boxed{" + "9" * 5000 + "}", None),
    ],
)
def test_the_last_box_counts_if_it_holds_a_whole_number(text: str, answer: int | None) -> None:
    assert final_integer(text) == answer


def test_listing_all_answers_is_no_answer() -> None:
    """In whatever order, so also with the right one last."""
    for last in (0, 250, 999):
        listed = [n for n in range(1000) if n != last] + [last]
        assert final_integer(" ".join(rf"\boxed{{{n}}}" for n in listed)) is None
    assert final_integer(r"\boxed{" + ", ".join(map(str, range(1000))) + "}") is None
