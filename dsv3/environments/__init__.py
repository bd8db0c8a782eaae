"""BabyAI and Crafter as text: BALROG's protocol (arXiv 2411.13543), environments rebuilt.

    episode.py          the contract of an episode, and opening one by name and seed
    wording.py          prompts, the action in a reply, plans of several actions
    babyai.py           five BabyAI task types on minigrid's levels, with minigrid's bot as the expert
    crafter.py          Crafter, its object order made deterministic
    crafter_policy.py   the scripted Crafter policy
    baselines.py        random legal actions and the expert, played to the end

For the evaluation of agents, for demonstrations and for rewards. minigrid and crafter come with the extra `agents`.
"""

from dsv3.environments.episode import ENVIRONMENTS, EVALUATION_SEEDS, Episode, check_name, in_turns, opened
from dsv3.environments.wording import ask, go_on, plan_of, read_action, read_plan

__all__ = [
    "ENVIRONMENTS",
    "EVALUATION_SEEDS",
    "Episode",
    "ask",
    "check_name",
    "go_on",
    "in_turns",
    "opened",
    "plan_of",
    "read_action",
    "read_plan",
]
