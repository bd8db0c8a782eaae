"""Success of the episode that an answer, a plan of actions, comes to."""

from collections.abc import Sequence

from dsv3.contracts import Answer
from dsv3.environments import opened, read_plan
from plugins.reward.base import Judge, field


class Episode(Judge):
    """Progress, from 0 to 1, after the plan's actions in the row's `environment`, from its `seed`, in `steps` at most.

    Whatever is no action takes a step and does nothing; a plan earns what it has reached when it ends.
    """

    reads = ("environment", "seed", "steps")

    def judge(self, answers: Sequence[Answer]) -> list[float]:
        return [_progress(answer) for answer in answers]


def _progress(answer: Answer) -> float:
    name, seed, steps = (field(answer, key) for key in Episode.reads)
    episode = opened(name, seed=seed, steps=steps)
    for action in read_plan(answer.text, episode.actions):
        if episode.over:
            break
        episode.step(action)
    return episode.progress
