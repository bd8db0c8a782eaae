"""Wording of agents' prompts: rules, earlier steps, what is seen now; and reading actions out of replies."""

import re
from collections.abc import Sequence

REPLY = "Action:"
PLAN = "Write all actions of the way to the goal, separated by commas.\nPlan:"
INVALID = "Your last reply was no action; nothing was done."

SEPARATORS = re.compile(r"[,;\n]+")
AROUND = " \t\r.:*\"'`"


def ask(rules: str, history: Sequence[tuple[str, str]], observation: str, *, plan: bool = False) -> str:
    """A prompt. `history`: earlier observations and actions, oldest first. `plan`: asks for all actions at once."""
    earlier = [f"{seen}\n{REPLY} {done}" for seen, done in history]
    return "\n".join([rules, *earlier, f"{observation}\n{PLAN}" if plan else go_on(observation)])


def go_on(observation: str) -> str:
    """What follows an action in a conversation that `ask` began."""
    return f"{observation}\n{REPLY}"


def read_action(reply: str, actions: Sequence[str]) -> str | None:
    """The action that the first line of a reply consists of; None where it says anything else.

    >>> read_action(" Turn left.", ["turn left"]), read_action("I turn left", ["turn left"])
    ('turn left', None)
    """
    first = reply.strip().partition("\n")[0].strip(AROUND).lower()
    first = first.removeprefix(REPLY.lower()).strip(AROUND)
    return first if first in actions else None


def plan_of(actions: Sequence[str]) -> str:
    return ", ".join(actions)


def read_plan(reply: str, actions: Sequence[str]) -> list[str | None]:
    """The actions of a plan in order; None for what is no action."""
    return [read_action(piece, actions) for piece in SEPARATORS.split(reply) if piece.strip(AROUND)]
