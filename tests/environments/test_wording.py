"""Prompts, and actions read out of replies."""

import pytest

from dsv3.environments import ask, plan_of, read_action, read_plan

ACTIONS = ("turn left", "go forward", "pick up")


@pytest.mark.parametrize(
    ("reply", "action"),
    [
        (" turn left", "turn left"),
        ("Turn Left.\nand then go forward", "turn left"),
        ("Action: go forward", "go forward"),
        ("`pick up`", "pick up"),
        ("turn left or go forward", None),
        ("I turn left", None),
        ("", None),
        ("\n\n", None),
        ("turn  left", None),
        ("__import__('os').abort()", None),
        ("turn left" * 10_000, None),
    ],
)
def test_a_reply_is_an_action_or_none(reply: str, action: str | None) -> None:
    assert read_action(reply, ACTIONS) == action


def test_a_plan_is_read_as_it_is_written() -> None:
    plan = ["turn left", "go forward", "go forward"]
    assert read_plan(f" {plan_of(plan)}.", ACTIONS) == plan
    assert read_plan("turn left; jump\ngo forward,,", ACTIONS) == ["turn left", None, "go forward"]
    assert read_plan("", ACTIONS) == []


def test_a_prompt_ends_where_the_action_begins() -> None:
    asked = ask("Rules.", [("Seen before.", "turn left")], "Seen now.")
    assert asked == "Rules.\nSeen before.\nAction: turn left\nSeen now.\nAction:"
    assert ask("Rules.", [], "Seen.", plan=True).endswith("Plan:")
