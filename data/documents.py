"""Documents and what is left out: the records that a source of text yields."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

PIECE = 1_000_000
"""Characters from which on a text is handled in pieces: bounds the memory that one document takes."""


class Document(NamedTuple):
    """One document of a domain."""

    name: str
    text: (
        str | Iterable[str]
    )  # or its parts in order, of a text too long for memory: read once, before the next document
    held_out: bool | None = None  # None: not decided by the source
    group: str = ""  # documents of one group are held out together; "": the document is a group of its own
    family: str = ""  # of a question with one right answer: its kind, and the answer that ends the text
    answer: str = ""


class LeftOut(NamedTuple):
    """A file or a row that gives no document."""

    name: str
    reason: str  # one of few: they are counted by it
    detail: str = ""


class HeldOut(NamedTuple):
    """A held-out document."""

    name: str
    text: str
    family: str
    answer: str


class BadTextError(ValueError):
    """A file or row that cannot be read; says which, and why."""


def parts_of(text: str | Iterable[str]) -> Iterable[str]:
    """A text in its order; of a string, `PIECE` characters at a time, so that no copy of all of it is encoded."""
    if isinstance(text, str):
        return (text[start : start + PIECE] for start in range(0, len(text), PIECE))
    return text


def pieces(text: str | Iterable[str]) -> Iterator[str]:
    """Consecutive pieces of at most `PIECE` characters, each tokenised by itself.

    A piece ends at the last line break that a letter follows, or without one after `PIECE` characters. They depend on
    the text alone, not on the parts in which it arrives.
    """
    waiting = ""
    for part in parts_of(text):
        waiting += part
        while len(waiting) > PIECE:
            cut = _cut(waiting)
            yield waiting[:cut]
            waiting = waiting[cut:]
    if waiting:
        yield waiting


def _cut(text: str) -> int:
    end = PIECE
    while (place := text.rfind("\n", 0, end)) >= 0:
        if text[place + 1].isalpha():
            return place + 1
        end = place
    return PIECE
