"""Every shipped reward passes `check_reward`; rewards with one fault each do not."""

import itertools
import random
import time
from typing import Any

import pytest
import reasoning_gym
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from dsv3.config.part import part
from dsv3.sandbox import Sandbox
from dsv3.testing import Marked, check_reward
from tests.conftest import ROOT

needs_jail = pytest.mark.skipif(Sandbox().refusal is not None, reason=str(Sandbox().refusal))

TWO_TERMS = {"min_terms": 2, "max_terms": 2}
SUM = reasoning_gym.create_dataset("chain_sum", seed=1, size=1, **TWO_TERMS)[0]
DOUBLE = "```python\ndef double(x):\n    return 2 * x\n```"
HALF = "```python\ndef double(x):\n    return x / 2\n```"
VERIFIED = {
    "exact": [Marked({"answer": "25"}, "25", "26"), Marked({"answer": " Paris "}, "Paris\n", "Rome")],
    "boxed_integer": [
        Marked({"answer": "25"}, r"so $n = \boxed{025}$.", r"\boxed{26}"),
        Marked({"answer": -3}, r"\boxed{ -3 }", r"\boxed{3}"),
    ],
    "math_verify": [Marked({"answer": "$x^2+1$"}, r"It is \boxed{1 + x^2}.", r"\boxed{x^2}")],
    "reasoning_gym": [
        Marked({"family": "chain_sum", "settings": TWO_TERMS, "entry": SUM}, SUM["answer"], f"{SUM['answer']}1")
    ],
    "code_tests": [Marked({"tests": "assert double(21) == 42"}, f"It is\n{DOUBLE}\nas asked.", HALF)],
}
ITEMS = VERIFIED | {
    "by_verifier": [
        marked._replace(item={**marked.item, "verifier": name})
        for name in ("exact", "boxed_integer", "reasoning_gym")
        for marked in VERIFIED[name]
    ],
    "episode": [
        Marked({"environment": "babyai/goto", "seed": 0, "steps": 9}, "go forward, go forward, turn right", "turn left")
    ],
    "format": [Marked({}, r"It is \boxed{x}", "It is x.")],
    "weighted_sum": [Marked({"answer": 25, "verifier": "boxed_integer"}, r"It is \boxed{25}", r"\boxed{26}")],
}


def shipped(name: str, *overrides: str) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", overrides=[f"reward={name}", *overrides]).reward


OPTIONS = sorted(path.stem for path in (ROOT / "conf" / "reward").glob("*.yaml"))


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "code_tests"])
def test_shipped_rewards_conform(name: str) -> None:
    config = shipped(name)
    check_reward(lambda: part(config), ITEMS[name])


@pytest.mark.slow
@needs_jail
def test_the_reward_of_programs_conforms() -> None:
    config = shipped("code_tests", "reward.seconds=1")
    check_reward(lambda: part(config), ITEMS["code_tests"])


class Contains:
    """Right if the answer is anywhere in the text."""

    def __call__(self, answers: Any) -> Any:
        return [self.value(a) if a.ended and a.text.strip() else 0.0 for a in answers]

    def value(self, answer: Any) -> float:
        return float(answer.item["answer"] in answer.text)


class Only(Contains):
    def value(self, answer: Any) -> float:
        return float(answer.text.strip() == answer.item["answer"])


class PaysCutAnswers(Only):
    def __call__(self, answers: Any) -> Any:
        return [self.value(a) for a in answers]


class PaysSilence(Only):
    def __call__(self, answers: Any) -> Any:
        return [self.value(a) if a.ended else 0.0 for a in answers]

    def value(self, answer: Any) -> float:
        return 0.5 if not answer.text else super().value(answer)


class PaysLists(Only):
    """Right if the answer is in the text, but for the last word; two words are too few to be a list."""

    def value(self, answer: Any) -> float:
        words = answer.text.split()
        return max(super().value(answer), float(len(words) > 9 and answer.item["answer"] in words))


class PaysWrongAnswers(Only):
    def value(self, answer: Any) -> float:
        return 1 - super().value(answer)


class NotANumber(Only):
    def value(self, answer: Any) -> float:
        return super().value(answer) or float("nan")


class Pairs(Only):
    def __call__(self, answers: Any) -> Any:
        return tuple(super().__call__(answers))


class OneShort(Only):
    def __call__(self, answers: Any) -> Any:
        return super().__call__(answers)[:-1]


class NoneForNothing(Only):
    def __call__(self, answers: Any) -> Any:
        return super().__call__(answers) or None


class PaysLength(Only):
    def value(self, answer: Any) -> float:
        return super().value(answer) + float(len(answer.text) > 500_000)


class EncodesText(Only):
    def value(self, answer: Any) -> float:
        return float(answer.text.encode().strip() == answer.item["answer"].encode())


class Slow(Only):
    def value(self, answer: Any) -> float:
        if answer.text == "NaN":
            time.sleep(0.3)
        return super().value(answer)


class Forgiving(Only):
    """Later answers to a row count half."""

    def __call__(self, answers: Any) -> Any:
        return [value / (1 + (place > 1)) for place, value in enumerate(super().__call__(answers))]


class OnceEach(Only):
    """A second answer like an earlier one earns nothing."""

    def __call__(self, answers: Any) -> Any:
        texts = [answer.text for answer in answers]
        return [
            value * (texts.index(text) == place)
            for place, (text, value) in enumerate(zip(texts, super().__call__(answers), strict=True))
        ]


class Drawn(Only):
    def value(self, answer: Any) -> float:
        return super().value(answer) * (1 + random.random())


class DrawnOnce(Only):
    draws = itertools.count(1)

    def __init__(self) -> None:
        self.factor = next(self.draws)

    def value(self, answer: Any) -> float:
        return super().value(answer) * self.factor


class UnfinishedLast(Only):
    """Puts the zeros of answers that have not ended after the others."""

    def __call__(self, answers: Any) -> Any:
        ended = [answer for answer in answers if answer.ended]
        return super().__call__(ended) + [0.0] * (len(answers) - len(ended))


class Notes(Only):
    def value(self, answer: Any) -> float:
        answer.item["seen"] = True
        return super().value(answer)


@pytest.mark.parametrize(
    ("reward", "words"),
    [
        (Contains, "only the policy may choose among its answers"),
        (PaysCutAnswers, "has not ended must earn 0; '25' earns 1"),
        (PaysSilence, "without text must earn 0; '' earns 0.5"),
        (PaysLists, "lists numbers must earn 0"),
        (PaysWrongAnswers, "a right answer must earn more than a wrong one"),
        (NotANumber, "must be a finite number; '26' earns nan"),
        (Pairs, r"must earn \[\], not \(\)"),
        (OneShort, "2 answers must earn a list of 2 numbers"),
        (NoneForNothing, r"must earn \[\], not None"),
        (PaysLength, "huge .* must earn 0, not 1"),
        (EncodesText, "lone surrogates .* raises UnicodeEncodeError"),
        (Slow, "NaN .* took 0 s"),
        (Forgiving, "earns 1.0 alone and 0.5 among others"),
        (OnceEach, "earns 1.0 alone and 0.0 among others"),
        (Drawn, "must depend on the answer and its row alone"),
        (DrawnOnce, "a resumed run makes a new one"),
        (UnfinishedLast, "among answers that have not ended"),
        (Notes, "`item` must be left as it is"),
    ],
)
def test_faulty_rewards_are_found(reward: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3.testing.reward.SECONDS", 0.2)
    with pytest.raises(AssertionError, match=words):
        check_reward(reward, [Marked({"answer": "25"}, "25", "26")])


def test_what_the_faulty_ones_derive_from_conforms() -> None:
    check_reward(Only, [Marked({"answer": "25"}, "25", "26")])
