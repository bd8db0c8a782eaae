"""Success of the episode that an answer, a plan of actions or one in each turn, comes to."""

from collections.abc import Sequence

from dsv3.contracts import Answer
from dsv3.environments import check_name, in_turns, opened, read_action, read_plan
from plugins.reward.base import Judge, field


class Episode(Judge):
    """Progress, from 0 to 1, after the answer's actions in the row's `environment`, from its `seed`, in `steps` at
    most.

    Where the row says `form: turns`, every turn is an action; one that is none takes time, and nothing else. A plan
    earns nothing if it holds anything that is no action, or goes on after the episode's end: only the policy may choose
    where it ends.
    """

    reads = ("environment", "seed", "steps")

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        for answer in answers:
            check_name(field(answer, "environment"))
        return super().__call__(answers)

    def judge(self, answers: Sequence[Answer]) -> list[float]:
        return [_progress(answer) for answer in answers]


def _progress(answer: Answer) -> float:
    name, seed, steps = (field(answer, key) for key in Episode.reads)
    episode = opened(name, seed=seed, steps=steps)
    if in_turns(answer.item):
        for reply in answer.turns:
            episode.step(read_action(reply, episode.actions))
        return episode.progress
    for action in read_plan(answer.text, episode.actions):
        if action is None or episode.over:
            return 0.0
        episode.step(action)
    return episode.progress
