"""A text that an engine is writing: its tokens, what is read of it, and what comes next."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dsv3.inference.recorded_experts import RecordedExperts
from dsv3.inference.sampling import Choice, Greedy, Settings, penalised
from dsv3.inference.text import TextStream

Watch = Callable[[Tensor], None]
"""Is given the logits [T, V] at each T positions of a prompt that were read."""

Finish = Literal["eos", "stop", "length", "cancelled"]


class Event(NamedTuple):
    """News of a row."""

    row: int
    ids: list[int]  # new ones, as they were chosen: those of a stop string too, never an end of text
    text: str  # new text to show: whole characters and no part of a stop string; empty without a `decode`
    finished: Finish | None  # why the row ended: then it is gone


@dataclass
class Row:
    """A text that is being written."""

    number: int
    settings: Settings
    choice: Choice
    tokens: list[int]  # the prompt's, then those written
    prompt: int  # how many are the prompt's
    stream: TextStream | None
    owner: str
    watch: Watch | None
    experts: RecordedExperts | None = None
    read: int = 0  # positions that the backend holds
    copied: int = 0  # of these, taken from another row
    drafts: list[int] = field(default_factory=list)  # after the tokens, not verified yet
    drafts_made: int = 0  # and verified
    drafts_kept: int = 0

    @property
    def written(self) -> int:
        return len(self.tokens) - self.prompt

    @property
    def unread(self) -> int:
        return len(self.tokens) - self.read

    @property
    def takes_likeliest(self) -> bool:
        """Whether what it writes next is the likeliest token of the model, and no more."""
        return type(self.choice) is Greedy and not self.settings.penalises and not self.drafts

    def penalised(self, logits_V: Tensor, drafts: Sequence[int]) -> Tensor:
        if not self.settings.penalises:
            return logits_V
        return penalised(logits_V, self.settings, self.tokens[: self.prompt], [*self.tokens[self.prompt :], *drafts])

    def chooser(self) -> Callable[[Tensor], int]:
        """Chooses drafts from logits in turn."""
        drafted: list[int] = []

        def choose(logits_V: Tensor) -> int:
            drafted.append(self.choice.draft(self.penalised(logits_V, drafted)))
            return drafted[-1]

        return choose

    def choose(self, logits_SV: Tensor) -> tuple[int, list[int]]:
        """How many drafts are kept, and the tokens that follow the text."""
        if self.settings.penalises:
            logits_SV = torch.stack([self.penalised(row_V, self.drafts[:j]) for j, row_V in enumerate(logits_SV)])
        kept, token = self.choice.verify(logits_SV, self.drafts)
        return kept, [*self.drafts[:kept], token]

    def write(self, chosen: Sequence[int]) -> Event:
        """Add tokens, as far as the text goes."""
        start, shown = len(self.tokens), ""
        finished: Finish | None = None
        for token in chosen:
            if token in self.settings.eos:
                finished = "eos"
                break
            self.tokens.append(token)
            stopped = False
            if self.stream is not None:
                new, stopped = self.stream.push(token)
                shown += new
            if stopped or self.written == self.settings.max_tokens:
                finished = "stop" if stopped else "length"
                break
        if self.stream is not None and finished in ("eos", "length"):
            shown += self.stream.finish()
        return Event(self.number, self.tokens[start:], shown, finished)
