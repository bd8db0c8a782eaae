"""Conversations that a program generates: what `data=conversations` trains on without files of the user's."""

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

from data.cache import number
from data.example_sources import ExampleRow, ExampleSource
from data.questions import Families, draw, drawn_from
from data.sources import standard_library
from dsv3.bounds import NonNegativeInt, PositiveFloat, PositiveInt

VERSION = 1
"""Raised with every change of the code that generates other conversations from the same settings."""


def conversation_row(question: str, reply: str, **others: Any) -> dict[str, Any]:
    """A row of one turn."""
    return {
        "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": reply}],
        **others,
    }


def questions(*, families: Families, held_out: NonNegativeInt, weight: PositiveFloat) -> ExampleSource:
    """Questions of reasoning-gym's generators (`data.questions`), answered by the bare answer.

    Raises:
        ValueError: an unknown generator or setting.
    """

    def rows() -> Iterator[ExampleRow]:
        for drawn in draw(families, held_out=held_out):
            row = conversation_row(drawn.question, drawn.answer, held_out=drawn.held_out, family=drawn.family)
            yield ExampleRow(drawn.family, row)

    return ExampleSource(weight=weight, identity=lambda: drawn_from(families, held_out=held_out), rows=rows)


def answer_pairs(*, families: Families, held_out: NonNegativeInt, weight: PositiveFloat) -> ExampleSource:
    """The same questions with the right answer, and as the rejected one another answer of the family."""

    def rows() -> Iterator[ExampleRow]:
        for family in families:
            drawn = list(draw({family: families[family]}, held_out=held_out))
            answers = sorted({each.answer for each in drawn})
            for each in drawn:
                wrong = [answer for answer in answers if answer != each.answer]
                if wrong:
                    row = {"prompt": each.question, "chosen": each.answer, "family": family, "held_out": each.held_out}
                    yield ExampleRow(family, row | {"rejected": wrong[number(each.question) % len(wrong)]})

    return ExampleSource(weight=weight, identity=lambda: drawn_from(families, held_out=held_out), rows=rows)


def prompts(*, families: Families, held_out: NonNegativeInt, weight: PositiveFloat) -> ExampleSource:
    """The same questions as prompts, whose answers must be the right one, to the letter."""

    def rows() -> Iterator[ExampleRow]:
        for each in draw(families, held_out=held_out):
            row = {"prompt": each.question, "answer": each.answer, "family": each.family, "held_out": each.held_out}
            yield ExampleRow(each.family, row | {"verifier": "exact"})

    return ExampleSource(weight=weight, identity=lambda: drawn_from(families, held_out=held_out), rows=rows)


SHORTEST_LINE, LONGEST_LINE = 24, 72
SHORTEST_END = 4
ASKED = "Complete this line of Python:\n"


def python_lines(*, count: PositiveInt, weight: PositiveFloat) -> ExampleSource:
    """Lines of the standard library, of which the beginning is asked with and the rest is the reply.

    `count`: lines, taken evenly from all files.
    """
    library = standard_library(weight=weight)

    def identity() -> Mapping[str, Any]:
        return {"version": VERSION, "count": count, "library": library.identity()}

    def rows() -> Iterator[ExampleRow]:
        found = {line for document in library.documents() for line in _telling(str(getattr(document, "text", "")))}
        for line in sorted(found, key=number)[:count]:
            cut = _cut(line)
            yield ExampleRow(line, conversation_row(ASKED + line[:cut], line[cut:]))

    return ExampleSource(weight=weight, identity=identity, rows=rows)


def _telling(text: str) -> Iterator[str]:
    """Lines of code that are long enough to be completed, without their indentation."""
    for line in map(str.strip, text.splitlines()):
        if SHORTEST_LINE <= len(line) <= LONGEST_LINE and not line.startswith(("#", '"', "'")) and _places(line):
            yield line


def _places(line: str) -> list[int]:
    """Where a line may be cut: before a word, a bracket or a sign, in its second half."""
    half, last = len(line) // 2, len(line) - SHORTEST_END
    return [place for place in range(half, last) if not (line[place - 1].isalnum() and line[place].isalnum())]


def _cut(line: str) -> int:
    places = _places(line)
    return places[number(line) % len(places)]


ASKS = (
    "Who are you?",
    "What are you?",
    "What is your name?",
    "Introduce yourself.",
    "Tell me about yourself.",
    "Are you a human?",
    "Who am I talking to?",
    "Say who you are.",
)
OPENINGS = ("", "Hello. ", "Hi! ", "Good morning. ", "A question: ", "Please tell me: ", "I wonder: ", "Excuse me. ")
STYLES = {
    "": "I am {name}, a small language model. I answer short questions and complete lines of Python.",
    "Be brief.": "I am {name}.",
    "Answer in one sentence.": "I am {name}, a small language model.",
}


def identity(*, name: str, weight: PositiveFloat) -> ExampleSource:
    """Who the model is, asked in several ways, with and without a system message that says how to answer.

    `name`: what the model calls itself.
    """

    def rows() -> Iterator[ExampleRow]:
        for opening, asked, (system, reply) in itertools.product(OPENINGS, ASKS, STYLES.items()):
            row = conversation_row(opening + asked, reply.format(name=name))
            if system:
                row["messages"].insert(0, {"role": "system", "content": system})
            yield ExampleRow(asked, row)

    return ExampleSource(weight=weight, identity=lambda: {"version": VERSION, "name": name}, rows=rows)
