"""Does a reward keep to `dsv3.contracts.Reward`?"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from dsv3.contracts import Answer, Reward
from dsv3.testing.requirement import require

SECONDS = 60.0
"""Longest time for one hostile answer, on a busy machine."""
NUMBERS = range(-10, 1001)


class Marked(NamedTuple):
    """A row of the data, with an answer to it that is right, and a wrong one in the same form."""

    item: Mapping[str, Any]
    right: str
    wrong: str
    prompt: str = ""


def check_reward(factory: Callable[[], Reward], items: Sequence[Marked]) -> None:
    """Raise AssertionError, saying what is wrong, unless `factory()` is a reward that the core can use.

    items: at least one row of each kind that the reward knows.
    """
    reward, before = factory(), copy.deepcopy([marked.item for marked in items])
    require(reward([]) == [], f"no answers must earn [], not {reward([])!r}")
    for marked in items:
        _marks(reward, marked)
        _worthless(reward, marked)
        _hostile(reward, marked)
    _alone_and_together(factory, items)
    require(before == [marked.item for marked in items], "`item` must be left as it is: other answers to it follow")


def _earned(reward: Reward, answers: Sequence[Answer]) -> list[float]:
    """What the answers earn, once it is known to be a finite number each."""
    values = reward(answers)
    require(
        isinstance(values, list) and len(values) == len(answers),
        f"{len(answers)} answers must earn a list of {len(answers)} numbers, not {values!r:.200}",
    )
    for value, answer in zip(values, answers, strict=True):
        require(
            isinstance(value, int | float) and math.isfinite(value),
            f"a reward must be a finite number; {answer.text!r:.60} earns {value!r}",
        )
    return values


def _answer(marked: Marked, text: str, *, ended: bool = True) -> Answer:
    return Answer(marked.prompt, text, list(text.encode(errors="surrogatepass")), ended, marked.item)


def _marks(reward: Reward, marked: Marked) -> None:
    right, wrong = _earned(reward, [_answer(marked, marked.right), _answer(marked, marked.wrong)])
    require(
        right > wrong,
        f"a right answer must earn more than a wrong one; {marked.right!r:.60} earns {right}, "
        f"{marked.wrong!r:.60} earns {wrong}",
    )
    longer = [_answer(marked, f"{marked.right}{between}{marked.wrong}") for between in ("\n", " ", ", ", " or ")]
    for value, answer in zip(_earned(reward, longer), longer, strict=True):
        require(
            value <= wrong,
            f"an answer that goes on with a wrong one must earn no more than the wrong one, {wrong}; "
            f"{answer.text!r:.120} earns {value}: only the policy may choose among its answers",
        )


def _worthless(reward: Reward, marked: Marked) -> None:
    """Answers that earn nothing whatever the question."""
    finished = [marked.right, marked.wrong]
    for kind, answers in {
        "an answer that has not ended": [_answer(marked, text, ended=False) for text in finished],
        "an answer without text": [_answer(marked, text) for text in ("", " ", "\n\n")],
        "an answer that lists numbers": [_answer(marked, text) for text in _lists()],
    }.items():
        for value, answer in zip(_earned(reward, answers), answers, strict=True):
            require(value == 0, f"{kind} must earn 0; {answer.text!r:.60} earns {value}")


def _lists() -> Iterator[str]:
    for between in (" ", ", ", "\n", " or "):
        yield between.join(map(str, NUMBERS))
    yield " ".join(rf"\boxed{{{number}}}" for number in NUMBERS)
    yield rf"\boxed{{{', '.join(map(str, NUMBERS))}}}"
    yield "\n".join(f"<answer>{number}</answer>" for number in NUMBERS)


HOSTILE = {
    "huge": "9" * 1_000_000,
    "huge words": "boxed{ " * 100_000,
    "boxes": r"\boxed{" * 10_000,
    "fences": "```python\n" * 10_000,
    "brackets": "[" * 10_000,
    "nested brackets": "(" * 10_000 + ")" * 10_000,
    "NaN": "NaN",
    "infinity": "1e999999999",
    "powers": "9**9**9**9",
    "boxed powers": r"\boxed{9^{9^{9^{9}}}}",
    "import": "__import__('os').getpid()",
    "subclasses": "().__class__.__base__.__subclasses__()",
    "exit": "raise SystemExit(0)",
    "lone surrogates": "\ud800 \udfff",
    "NUL": "\0",
    "digits of other scripts": "\u0662\u0665 \uff12\uff15 \u00b2",
}


def _hostile(reward: Reward, marked: Marked) -> None:
    for name, text in HOSTILE.items():
        started = time.monotonic()
        try:
            (value,) = _earned(reward, [_answer(marked, text)])
        except AssertionError:
            raise
        except Exception as error:
            raise AssertionError(
                f"no answer may end training; {name} ({text!r:.40}) raises {type(error).__name__}: {error!s:.100}"
            ) from error
        seconds = time.monotonic() - started
        require(value == 0, f"{name} ({text!r:.40}) must earn 0, not {value}")
        require(seconds < SECONDS, f"{name} ({text!r:.40}) took {seconds:.0f} s, more than {SECONDS:g} s")


def _alone_and_together(factory: Callable[[], Reward], items: Sequence[Marked]) -> None:
    """The same values in any order and company, again, and from a new reward."""
    texts = [(marked, text) for marked in items for text in (marked.right, marked.wrong, marked.right)]
    answers = [_answer(marked, text) for marked, text in texts]
    reward = factory()
    together = _earned(reward, answers)
    rests = "a reward must depend on the answer and its row alone"
    for value, answer in zip(together, answers, strict=True):
        alone = _earned(reward, [answer])
        require(alone == [value], f"{rests}; {answer.text!r:.60} earns {alone[0]} alone and {value} among others")
    again = _earned(factory(), answers)
    require(
        again == together, f"{rests}; a new reward gives {again} instead of {together}: a resumed run makes a new one"
    )
    pairs = [(answer._replace(ended=False), answer) for answer in reversed(answers)]
    mixed = _earned(reward, [answer for pair in pairs for answer in pair])
    require(
        mixed == [earned for value in reversed(together) for earned in (0, value)],
        f"{rests}; in reverse order, among answers that have not ended, the others earn {mixed[1::2]}, not "
        f"{together[::-1]}",
    )
