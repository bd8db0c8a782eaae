"""Configuration problems and how they are printed."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from typing import Any

NO_VALUE = object()
"""In place of a problem's value where nothing was given."""


@dataclass(frozen=True)
class Problem:
    """One mistake: the key, the value given, and what would be right (a bound, a type, or the nearest name)."""

    key: str
    value: Any
    message: str

    def __str__(self) -> str:
        given = self.key if self.value is NO_VALUE else f"{self.key}={shown(self.value)}"
        return f"{given}: {self.message}"


def shown(value: Any) -> str:
    """A value as it is written on the command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ", ".join(shown(item) for item in value) + "]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {shown(item)}" for key, item in value.items()) + "}"
    return str(value)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`, or None; a dotted key may be known by its last part alone."""
    names = list(known)

    def likeness(candidate: str) -> float:
        whole = SequenceMatcher(None, name, candidate).ratio()
        last = SequenceMatcher(None, name.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        # Among keys with the same last part, the better prefix wins, then the shorter key.
        return max(whole, 0.95 * last) + 0.01 * whole - 1e-4 * candidate.count(".")

    best = max(names, key=likeness, default=None)
    return best if best is not None and likeness(best) >= 0.65 else None


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """ " Did you mean 'x'?", or nothing."""
    best = nearest(name, known)
    return f" Did you mean {best!r}?" if best else ""


def one_of(options: Sequence[Any], value: Any) -> str:
    """ "must be one of a, b, c", with the nearest first where there is one."""
    names = [shown(option) for option in options]
    if value == "mps" and {"cpu", "cuda"} <= {*names}:
        return f"must be one of {', '.join(names)}; nobody has tested mps yet"
    near = get_close_matches(shown(value), names, n=1)
    return f"must be one of {', '.join(names)}." + (f" Did you mean {near[0]!r}?" if near else "")


def report(problems: Sequence[Problem], *, hint: str) -> None:
    """Print all problems to stderr, numbered; coloured on a terminal."""
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    console.print(Text(f"{count}; nothing was started.", style="bold red"))
    for number, problem in enumerate(problems, 1):
        given, _, message = str(problem).partition(": ")
        console.print(Text.assemble(f"{number:>3}. ", (given, "bold"), ": ", message))
    console.print(Text(hint))


def print_page(lines: Iterable[str]) -> None:
    """Print a page to stdout; on a terminal its headings, which are in capitals, are bold."""
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for line in lines:
        console.print(Text(line, style="bold" if line.isupper() else ""))
