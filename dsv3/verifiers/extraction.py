"""Final answers and programs, found in what a model wrote. Of several that differ none is taken, unless it says so."""

import re
from collections.abc import Iterator

MARK = re.compile(r"(?P<box>\\boxed\s*\{)|(?P<open>\{)|(?P<close>\})|\\.", re.DOTALL)  # `\{` is text, no brace
DEPTH = {"box": 1, "open": 1, "close": -1}
INTEGER = re.compile(r"[+-]?[0-9]{1,1000}")  # int() refuses more than 4300 digits
FENCE = "```"
MOST_BOXES = 3
"""Different ones, of a text that corrects itself."""


def boxed(text: str) -> str | None:
    r"""The content of `\boxed{...}`; None where there is no box, one that does not close, or two that differ.

    >>> boxed(r"so $x = \boxed{\frac{1}{2}}$.")
    '\\frac{1}{2}'
    """
    contents = set(_boxes(text))
    return contents.pop() if len(contents) == 1 else None


def boxed_integer(text: str) -> int | None:
    r"""The integer in `\boxed{...}`; None where it holds anything else, or where boxes hold different integers.

    >>> boxed_integer(r"\boxed{025}"), boxed_integer(r"\boxed{24} or \boxed{25}"), boxed_integer(r"\boxed{25.0}")
    (25, None, None)
    """
    contents = [content or "" for content in _boxes(text)]
    values = {int(content) if INTEGER.fullmatch(content) else None for content in contents}
    return values.pop() if len(values) == 1 else None


def final_integer(text: str) -> int | None:
    r"""The integer in the last `\boxed{...}`, for answers that follow reasoning.

    None where the last box holds anything else or does not close, and where there are more than `MOST_BOXES` different
    boxes: a list of answers is none.

    >>> final_integer(r"\boxed{3}? No, \boxed{4}."), final_integer(r"\boxed{4} or \boxed{x}")
    (4, None)
    """
    contents = list(_boxes(text))
    if not contents or len(set(contents)) > MOST_BOXES:
        return None
    return int(contents[-1]) if contents[-1] and INTEGER.fullmatch(contents[-1]) else None


def _boxes(text: str) -> Iterator[str | None]:
    """Contents of the outermost boxes, in order; None for one that does not close."""
    depth = start = 0
    for mark in MARK.finditer(text):
        if depth == 0 and mark.lastgroup == "box":
            depth, start = 1, mark.end()
        elif depth > 0:
            depth += DEPTH.get(mark.lastgroup or "", 0)
            if depth == 0:
                yield text[start : mark.start()].strip()
    if depth:
        yield None


def program(text: str) -> str | None:
    """The code between two fences of backticks, or without fences the whole text; None where there are more."""
    lines = text.split("\n")
    fences = [number for number, line in enumerate(lines) if line.startswith(FENCE)]
    if not fences:
        return text
    return "\n".join(lines[fences[0] + 1 : fences[1]]) if len(fences) == 2 else None
