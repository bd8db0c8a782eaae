"""Shipped rewards: the answers that each pays for, and its message about rows that it cannot use."""

from typing import Any

import pytest
import reasoning_gym

from dsv3.config.part import part
from dsv3.contracts import Answer
from plugins.reward.boxed_integer import BoxedInteger
from plugins.reward.by_verifier import ByVerifier
from plugins.reward.code_tests import CodeTests
from plugins.reward.exact import Exact
from plugins.reward.format import Format
from plugins.reward.math_verify import MathVerify
from plugins.reward.reasoning_gym import ReasoningGym
from plugins.reward.weighted_sum import WeightedSum
from tests.plugins.reward.test_reward_conformance import needs_jail, shipped

DOUBLE = "def double(x):\n    return 2 * x\n"


def answers(item: dict[str, Any], *texts: str) -> list[Answer]:
    return [Answer("", text, [], True, item) for text in texts]


def test_exact_match_ignores_white_space_around_and_nothing_else() -> None:
    given = answers({"answer": " a b\n"}, "a b", "\ta b ", "a  b", "A b", "a b.")
    assert Exact()(given) == [1, 1, 0, 0, 0]
    assert Exact()(answers({"answer": 25}, "25", "25.0")) == [1, 0]


def test_answers_that_were_cut_or_are_blank_earn_nothing_among_others() -> None:
    right, blank = answers({"answer": ""}, "25", " ")
    right = right._replace(item={"answer": "25"})
    assert Exact()([right._replace(ended=False), right, blank, right]) == [0, 1, 0, 1]


def test_an_integer_counts_in_a_box_alone() -> None:
    right = [r"\boxed{25}", r"So it is $\boxed{025}$, as asked.", r"\boxed{25} again \boxed{ 25 }", r"\boxed {+25}"]
    wrong = ["25", r"\boxed{25.0}", r"\boxed{x=25}", r"\boxed{24} \boxed{25}", r"\boxed{25} \boxed{?}", r"\boxed25"]
    assert BoxedInteger()(answers({"answer": "25"}, *right, *wrong)) == [1] * len(right) + [0] * len(wrong)
    assert BoxedInteger()(answers({"answer": "025"}, r"\boxed{25}")) == [1]


def test_formulas_are_equal_in_value_and_as_a_whole() -> None:
    right = ["0.5", "$1/2$", r"So \boxed{\frac{1}{2}}."]
    wrong = ["1/3", "1/3 1/2", "1/2, 1/3", r"\boxed{1/3} \boxed{1/2}", r"\boxed{}", r"\boxed{1/2", "It is 1/2."]
    assert MathVerify()(answers({"answer": r"\frac{1}{2}"}, *right, *wrong)) == [1] * len(right) + [0] * len(wrong)


def test_reasoning_gym_pays_for_full_marks_only() -> None:
    entry = reasoning_gym.create_dataset("countdown", seed=2, size=1)[0]
    numbers = "+".join(map(str, entry["metadata"]["numbers"]))
    item = {"family": "countdown", "entry": entry}
    assert ReasoningGym()(answers(item, f" {entry['answer']}\n", numbers, "1")) == [1, 0, 0]


@needs_jail
def test_programs_are_paid_for_by_their_tests() -> None:
    item = {"tests": "assert double(21) == 42", "prompt": "Write double."}
    fenced = f"```python\n{DOUBLE}```"
    given = [
        *answers(item, DOUBLE, f"Here it is:\n{fenced}\nDone.", f"{fenced}\n{fenced}", "```\n```", "return 2 * x"),
        *answers({**item, "code": "def double(x):\n"}, "    return 2 * x", "    return x"),
        *answers(
            {"tests": "def check(f):\n    assert f(1) == TWO", "setup": "TWO = 2", "entry_point": "double"}, DOUBLE
        ),
    ]
    assert CodeTests(seconds=2)(given) == [1, 1, 0, 0, 0, 1, 0, 1]


def test_without_a_jail_no_program_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3.sandbox.pool.refusal", lambda: "no jail here")
    with pytest.raises(RuntimeError, match="reward code_tests: no jail here"):
        CodeTests(seconds=2)(answers({"tests": ""}, DOUBLE))


def test_the_shipped_form_is_one_box_at_the_end() -> None:
    reward = Format(pattern=shipped("format").pattern)
    right = [r"\boxed{7}", "First\nsecond \\boxed{x}\n"]
    wrong = [r"\boxed{7} it is", r"\boxed{1} \boxed{7}", r"\boxed{}", r"\boxed{1, 7}", "7"]
    assert reward(answers({}, *right, *wrong)) == [1] * len(right) + [0] * len(wrong)
    with pytest.raises(ValueError, match=r"pattern=\(: must be a regular expression"):
        Format(pattern="(")


def test_each_row_goes_to_its_own_verifier_once() -> None:
    asked = []

    class Noting(Exact):
        def judge(self, answers: Any) -> list[float]:
            asked.append([answer.text for answer in answers])
            return super().judge(answers)

    reward = ByVerifier(rewards={"exact": Noting(), "boxed_integer": BoxedInteger()})
    plain, box = {"answer": "7", "verifier": "exact"}, {"answer": "7", "verifier": "boxed_integer"}
    mixed = [*answers(plain, "7"), *answers(box, "7", r"\boxed{7}"), *answers(plain, r"\boxed{7}", "7")]
    assert reward(mixed) == [1, 0, 1, 0, 1]
    assert asked == [["7", r"\boxed{7}", "7"]]


def test_a_weighted_sum_adds_up() -> None:
    reward = part(shipped("weighted_sum", "reward.terms.right.weight=2", "reward.terms.form.weight=0.5"))
    item = {"answer": 7, "verifier": "boxed_integer"}
    assert reward(answers(item, r"\boxed{7}", r"\boxed{7} it is", r"\boxed{8}", "It is 8")) == [2.5, 2, 0.5, 0]
    with pytest.raises(ValueError, match="must have at least one"):
        WeightedSum(terms={})


@pytest.mark.parametrize(
    ("reward", "item", "words"),
    [
        (Exact(), {"question": "?"}, "lacks `answer`, which its reward reads; it has question"),
        (BoxedInteger(), {"answer": "1/2"}, "answer='1/2' .* must be an integer for boxed_integer"),
        (ReasoningGym(), {"family": "chain_sum"}, "lacks `entry`"),
        (CodeTests(seconds=1), {"answer": ""}, "lacks `tests`"),
        (ByVerifier(rewards={"exact": Exact()}), {"answer": "7"}, "lacks `verifier`"),
        (
            ByVerifier(rewards={"math_verify": Exact(), "exact": Exact()}),
            {"verifier": "math_verifier"},
            r"verifier=math_verifier .* must be one of .*: math_verify, exact\. Did you mean 'math_verify'\?",
        ),
    ],
)
def test_rows_that_a_reward_cannot_use_are_named(reward: Any, item: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        reward(answers(item, "7"))
