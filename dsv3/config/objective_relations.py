"""Relations between an objective, its data and the models that it asks; part of `dsv3.config.relations`."""

from collections.abc import Iterator
from pathlib import Path

from dsv3.config.facts import Facts, Relation
from dsv3.config.problems import Problem

CONVERSATIONS = ("conversations", "babyai", "competition")
PROMPTS = ("prompts", "babyai_prompts", "babyai_turns", "competition_prompts")
DATA_OF = {
    "pretraining": ("default", "files", "hub", "large", "token_files"),
    "sft": CONVERSATIONS,
    "dpo": ("preferences",),
    "grpo": PROMPTS,
    "distill": (*PROMPTS, *CONVERSATIONS),
}
"""Options of `data` that conf/ ships, by the objective that they are for."""
FIXED_ROUTERS = ("hash", "random")


def objective_has_its_data(facts: Facts) -> Iterator[Problem]:
    """Of the data that conf/ ships; what a stranger's is fit for, it says itself."""
    objective, data = (facts.view.choices.get(kind) for kind in ("objective", "data"))
    fitting = DATA_OF.get(str(objective))
    if fitting is not None and data not in fitting and any(data in others for others in DATA_OF.values()):
        yield Problem("data", data, f"must be {' or '.join(fitting)} with objective={objective}")


def reference_is_named(facts: Facts) -> Iterator[Problem]:
    """The objectives that compare the model with the one that training begins with."""
    if "run.init_from" not in facts.view.leaves or facts.view.leaves["run.init_from"] is not None:
        return
    objective, leaves = facts.view.choices.get("objective"), facts.view.leaves
    divergence = facts.number("objective.kl")
    needed = {
        "dpo": True,
        "grpo": divergence is not None and divergence.value > 0,
        "distill": leaves.get("objective.teachers") is None,
    }
    if needed.get(str(objective)):
        message = f"objective={objective} compares the model with the one that training begins with: name a run"
        yield Problem("run.init_from", None, message)


def teachers_exist(facts: Facts) -> Iterator[Problem]:
    for path in facts.value("objective.teachers") or []:
        if not Path(str(path)).exists():
            yield Problem("objective.teachers", path, "must be run folders or checkpoints; there is none")


def answers_fit_rows(facts: Facts) -> Iterator[Problem]:
    answer, length = facts.number("objective.max_tokens"), facts.number("data.sequence_length")
    if answer and length and facts.view.choices.get("data") in PROMPTS and answer.value >= length.value:
        yield Problem(*answer, f"must be below {length.key}={length.value}, so that a prompt has room too")


def router_can_replay(facts: Facts) -> Iterator[Problem]:
    """Of the routers that conf/ ships; what a stranger's offers is seen when the model is built."""
    router = facts.view.choices.get("router")
    if facts.value("objective.replay_routing") is True and router in FIXED_ROUTERS:
        message = f"router={router} has no gates for recorded experts; must be false, or another router"
        yield Problem("objective.replay_routing", True, message)


OF_OBJECTIVES: tuple[Relation, ...] = (
    objective_has_its_data,
    reference_is_named,
    teachers_exist,
    answers_fit_rows,
    router_can_replay,
)
