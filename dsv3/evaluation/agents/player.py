"""A `ScoredModel` as the player of episodes: prompts as text, or as a user's message in the chat template."""

from collections.abc import Sequence
from dataclasses import replace

from dsv3.evaluation.agents.play import REPLY_TOKENS
from dsv3.inference.endings import score_endings
from dsv3.inference.engine import complete
from dsv3.inference.sampling import Settings
from dsv3.inference.scored_model import ScoredModel

UNBOUNDED = 1_000_000
"""Room in which no prompt is cut."""


class ModelPlayer:
    """`at_once`: prompts that are read together."""

    def __init__(self, model: ScoredModel, *, at_once: int) -> None:
        self.model, self.at_once = model, at_once

    def action_scores(self, prompts: Sequence[str], actions: Sequence[Sequence[str]]) -> list[list[float]]:
        """See `dsv3.evaluation.agents.play.Player`."""
        endings = [[self._ending(action) for action in legal] for legal in actions]
        read = [self._prompt(prompt, max(map(len, own))) for prompt, own in zip(prompts, endings, strict=True)]
        return score_endings(self.model.backend(), read, endings)

    def replies(self, prompts: Sequence[str], seeds: Sequence[int], temperature: float) -> list[str]:
        common = Settings(max_tokens=REPLY_TOKENS, temperature=temperature, stop=("\n",), eos=tuple(self.model.eos))
        settings = [replace(common, seed=seed) for seed in seeds]
        read = [self._prompt(prompt, REPLY_TOKENS) for prompt in prompts]
        written = complete(self.model.backend(), read, settings, decode=self.model.decode, at_once=self.at_once)
        return [completion.text for completion in written]

    def fits(self, prompt: str) -> bool:
        return len(self._prompt(prompt, self.model.max_length - UNBOUNDED)) + REPLY_TOKENS <= self.model.max_length

    def prompt_ids(self, text: str) -> list[int]:
        """As it is read before a reply."""
        return self._prompt(text, REPLY_TOKENS)

    def _prompt(self, text: str, reply: int) -> list[int]:
        room = self.model.max_length - reply
        framed = self.model.encode_framed(text, room)
        return framed if framed is not None else self.model.encode(text, bos=True)[-room:]

    def _ending(self, action: str) -> list[int]:
        return self.model.encode(action if self.model.chat else f" {action}", bos=False)
