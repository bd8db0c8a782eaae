"""Each row's own reward: its `verifier` names it."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from dsv3.contracts import Answer, Reward
from plugins.reward.base import field


class ByVerifier:
    """The reward that the row's `verifier` names, so that tasks of several kinds mix in one run.

    rewards: name -> reward.
    """

    def __init__(self, *, rewards: Mapping[str, Reward]) -> None:
        self.rewards = rewards

    def __call__(self, answers: Sequence[Answer]) -> list[float]:
        """Every reward is asked once, about all answers that are its own."""
        places: dict[str, list[int]] = {}
        for place, answer in enumerate(answers):
            places.setdefault(self._known(field(answer, "verifier")), []).append(place)
        earned = [0.0] * len(answers)
        for name, own in places.items():
            for place, value in zip(own, self.rewards[name]([answers[place] for place in own]), strict=True):
                earned[place] = value
        return earned

    def _known(self, name: str) -> str:
        if name not in self.rewards:
            near = get_close_matches(str(name), self.rewards, n=1, cutoff=0.0)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(
                f"verifier={name} of a row of the data: must be one of reward.rewards: {', '.join(self.rewards)}.{hint}"
            )
        return name
