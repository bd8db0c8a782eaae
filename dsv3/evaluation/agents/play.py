"""Plays episodes with a model: all of them take a step together, so that their model calls share batches.

Every step of an episode asks the model once, in one of two ways:

    likelihood   the legal action with the highest likelihood after the prompt: base models can play, and no action is
                 invalid
    text         what the model writes; a reply that is no legal action counts as invalid, nothing is done, and the next
                 observation says so
"""

import hashlib
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from dsv3.environments import Episode, ask, opened, read_action
from dsv3.environments.baselines import baselines
from dsv3.evaluation.agents.journal import Journal

Actions = Literal["likelihood", "text"]

AT_ONCE = 128
"""Episodes that are held open together."""
KEEP_EVERY = 8
"""Steps of an episode after which they are written into the journal."""
REPLY_TOKENS = 12
"""Room for a reply; the longest action has five tokens."""
DIGITS = 4
"""Of a recorded log-likelihood."""


class Player(Protocol):
    """What an agent needs of a model."""

    at_once: int
    """Prompts in one call, at most."""

    def action_scores(self, prompts: Sequence[str], actions: Sequence[Sequence[str]]) -> list[list[float]]:
        """log p(action | prompt), in nats, of every prompt's actions."""

    def replies(self, prompts: Sequence[str], seeds: Sequence[int], temperature: float) -> list[str]:
        """What is written after each prompt, up to the end of the line; drawn by its seed, greedy at temperature 0."""

    def fits(self, prompt: str) -> bool:
        """Whether the context holds a prompt and the longest action."""


class Game(NamedTuple):
    """An episode to be played, and how."""

    name: str
    seed: int
    steps: int
    history: int
    actions: Actions
    temperature: float = 0.0  # of sampling actions or text; 0: the likeliest
    draws: int = 0  # seed of the sampling


@dataclass
class Seat:
    """An episode that is being played."""

    number: int
    game: Game
    episode: Episode
    record: list[dict[str, Any]] = field(default_factory=list)
    hash: Any = field(default_factory=hashlib.sha256)
    prompt: str = ""
    kept: int = 0  # steps that the journal holds

    def observe(self, player: Player) -> None:
        """Make the prompt, with as many of the last steps as the game wants and the context holds."""
        seen = self._see()
        earlier = [(step["observation"], step["action"] or step["reply"]) for step in self.record]
        for held in range(min(self.game.history, len(earlier)), -1, -1):
            self.prompt = ask(self.episode.rules, earlier[len(earlier) - held :], seen)
            if not held or player.fits(self.prompt):
                break
        self.record.append({"observation": seen, "history": held})

    def replay(self, steps: Sequence[dict[str, Any]]) -> None:
        """Take steps that were taken before."""
        for step in steps:
            self._see()
            self.record.append({"observation": step["observation"], "history": step["history"]})
            self.act(**{key: value for key, value in step.items() if key not in ("observation", "history")})
        self.kept = len(steps)

    def _see(self) -> str:
        seen = self.episode.observation()
        self.hash.update(self.episode.state() + seen.encode())
        return seen

    @property
    def draw_seed(self) -> int:
        """Of what is sampled in this step."""
        drawn = f"{self.game.draws} {self.game.name} {self.game.seed} {len(self.record)}"
        return int.from_bytes(hashlib.sha256(drawn.encode()).digest()[:4], "little")

    def act(self, action: str | None, **how: Any) -> None:
        self.hash.update(str(action).encode())
        self.record[-1] |= {"action": action, **how}
        self.episode.step(action)

    def result(self) -> dict[str, Any]:
        """What an episode came to; JSON-serialisable. `trajectory_hash` is equal for equal episodes."""
        self.hash.update(self.episode.state())
        name, seed, steps = self.game[:3]
        return {
            "environment": name,
            "seed": seed,
            "progress": self.episode.progress,
            "achieved": list(self.episode.achieved),
            "steps": len(self.record),
            "invalid": sum(step["action"] is None for step in self.record),
            "history": sum(step["history"] for step in self.record) / len(self.record),
            **baselines(name, seed=seed, steps=steps)._asdict(),
            "trajectory_hash": self.hash.hexdigest(),
            "trajectory": self.record,
        }


def play(games: Sequence[Game], player: Player, *, journal: Journal | None = None) -> list[dict[str, Any]]:
    """The result of every game, in their order. What the journal holds is not played again.

    Raises:
        ValueError: there is no environment of some name.
    """
    journal = journal or Journal(None)
    results = {number: found for number, game in enumerate(games) if (found := journal.result(game)) is not None}
    waiting = iter([number for number in range(len(games)) if number not in results])
    seats: list[Seat] = []
    while len(results) < len(games):
        while len(seats) < AT_ONCE and (number := next(waiting, None)) is not None:
            game = games[number]
            seats.append(Seat(number, game, opened(game.name, seed=game.seed, steps=game.steps)))
            seats[-1].replay(journal.steps(game))
        for seat in seats:
            seat.observe(player)
        for together in _batches(seats, player.at_once):
            _take_turn(together, player)
        for seat in seats:
            if seat.episode.over:
                results[seat.number] = seat.result()
                journal.finish(seat.game, results[seat.number])
            elif len(seat.record) - seat.kept >= KEEP_EVERY:
                journal.keep(seat.game, seat.record, first=seat.kept)
                seat.kept = len(seat.record)
        seats = [seat for seat in seats if not seat.episode.over]
    return [results[number] for number in range(len(games))]


def _batches(seats: Sequence[Seat], at_once: int) -> Iterator[list[Seat]]:
    """Seats that one call of the model serves."""
    ways: dict[tuple[Actions, float], list[Seat]] = {}
    for seat in seats:
        ways.setdefault((seat.game.actions, seat.game.temperature), []).append(seat)
    for alike in ways.values():
        for start in range(0, len(alike), at_once):
            yield alike[start : start + at_once]


def _take_turn(seats: Sequence[Seat], player: Player) -> None:
    prompts, game = [seat.prompt for seat in seats], seats[0].game
    if game.actions == "text":
        replies = player.replies(prompts, [seat.draw_seed for seat in seats], game.temperature)
        for seat, reply in zip(seats, replies, strict=True):
            seat.act(read_action(reply, seat.episode.actions), reply=reply, rows=len(seats))
        return
    legal = [seat.episode.actions for seat in seats]
    for seat, scores in zip(seats, player.action_scores(prompts, legal), strict=True):
        by_action = dict(zip(seat.episode.actions, scores, strict=True))
        action = _chosen(by_action, game.temperature, seat.draw_seed)
        shown = {each: round(score, DIGITS) for each, score in by_action.items()}
        seat.act(action, log_likelihoods=shown, rows=len(seats))


def _chosen(scores: dict[str, float], temperature: float, seed: int) -> str:
    if not temperature:
        return max(scores, key=scores.__getitem__)
    highest = max(scores.values())
    weights = [math.exp((score - highest) / temperature) for score in scores.values()]
    return random.Random(seed).choices(list(scores), weights)[0]
