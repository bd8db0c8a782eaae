"""Rollouts of prompts: an answer of one turn, or an episode of a text environment, turn by turn.

A prompt opens an episode if its row says `form: turns`, with `environment`, `seed`, `steps` and `history`. Each reply
is an action; what the environment then says is the user's next message. Up to `history` earlier turns stay in the
conversation, as far as the context holds them; without any, every turn is asked as agents are in an evaluation.
"""

from collections.abc import Callable, Sequence
from random import Random

from dsv3.contracts import Prompt, Rollout, Tokenizer, Turn
from dsv3.environments import ask, go_on, in_turns, opened, read_action
from dsv3.prompts.chat import Message, chat_prompt

Reply = Callable[[Sequence[Sequence[int]], Sequence[int]], list[Turn]]
"""Continues prompts, each by its seed."""


def rollouts_of(
    prompts: Sequence[Prompt], seeds: Sequence[int], reply: Reply, tokenizer: Tokenizer, *, room: int
) -> list[Rollout]:
    """A rollout of each prompt; all of them take a turn together, so that they share model calls.

    room: the longest prompt of a turn.

    Raises:
        ValueError: an observation has no room, or there is no environment of some name.
    """
    asked = zip(prompts, seeds, strict=True)
    seats = [Episode(p, s, tokenizer, room) if in_turns(p.item) else Question(p, s) for p, s in asked]
    waiting = seats
    while waiting:
        turns = reply([seat.prompt() for seat in waiting], [seat.seed() for seat in waiting])
        for seat, turn in zip(waiting, turns, strict=True):
            seat.take(turn)
        waiting = [seat for seat in waiting if not seat.over]
    return [Rollout(seat.turns) for seat in seats]


class Question:
    """One turn."""

    over = False

    def __init__(self, asked: Prompt, seed: int) -> None:
        self.asked, self.first_seed = asked, seed
        self.turns: list[Turn] = []

    def prompt(self) -> list[int]:
        """Of the turn that comes now."""
        return self.asked.ids

    def seed(self) -> int:
        if not self.turns:
            return self.first_seed
        return Random(f"{self.first_seed}/{len(self.turns)}").getrandbits(63)

    def take(self, turn: Turn) -> None:
        self.turns.append(turn)
        self.over = True


class Episode(Question):
    """One of an environment."""

    def __init__(self, asked: Prompt, seed: int, tokenizer: Tokenizer, room: int) -> None:
        super().__init__(asked, seed)
        row = asked.item
        self.tokenizer, self.room, self.history = tokenizer, room, row.get("history", 0)
        self.environment = opened(row["environment"], seed=row["seed"], steps=row["steps"])
        self.begins = [asked.ids]  # each observation as the beginning of a conversation
        self.follows: list[list[int]] = [[]]  # and as a message that follows the turn before

    def prompt(self) -> list[int]:
        """With as many turns before it as are wanted and have room."""
        last = len(self.turns)
        for first in range(max(0, last - self.history), last + 1):
            ids = list(self.begins[first])
            for turn, message in zip(self.turns[first:], self.follows[first + 1 :], strict=True):
                ids += [*turn.ids, *([] if turn.ended else [self.tokenizer.eos]), *message]
            if len(ids) <= self.room:
                return ids
        raise ValueError(
            f"data.sequence_length: an observation of {self.asked.item['environment']} has {len(ids)} tokens, and "
            f"without objective.max_tokens there is room for {self.room}"
        )

    def take(self, turn: Turn) -> None:
        super().take(turn)
        self.environment.step(read_action(turn.text, self.environment.actions))
        self.over = self.environment.over
        if not self.over:
            seen = self.environment.observation()
            self.begins.append(self._ids(ask(self.environment.rules, [], seen)))
            self.follows.append(self._ids(go_on(seen))[1:])  # without BOS

    def _ids(self, message: str) -> list[int]:
        return chat_prompt(self.tokenizer, [Message("user", message)])
