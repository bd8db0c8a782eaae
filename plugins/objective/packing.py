"""Rollouts as packed rows: how they are drawn, and the micro-batches that are made of them."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from dsv3.contracts import IGNORE, MicroBatch, Models, Prompt, Rollout, Turn


class Drawn(NamedTuple):
    """A rollout, and what a loss needs at the positions of its tokens."""

    rollout: Rollout
    values: Mapping[str, float | Sequence[float]]  # one for all tokens, or one for each


class Said(NamedTuple):
    """A turn of a rollout, with its own values."""

    turn: Turn
    values: Mapping[str, float | Sequence[float]]

    @property
    def length(self) -> int:
        """Tokens that the model reads."""
        return len(self.turn.prompt) + len(self.turn.ids) - 1


def draw(
    prompts: Sequence[Prompt],
    models: Models,
    *,
    count: int,
    seed: int,
    max_tokens: int,
    temperature: float,
    experts: bool = False,
) -> list[Rollout]:
    """`count` rollouts of each prompt, one prompt after another, by the policy as it is now.

    Random numbers follow from seed, prompt and number of the rollout: they are the same on any number of ranks.
    """
    seeds = [seed_of(seed, prompt.number, number) for prompt in prompts for number in range(count)]
    asked = [prompt for prompt in prompts for _ in range(count)]
    return models.sample(asked, seeds, max_tokens=max_tokens, temperature=temperature, experts=experts)


def seed_of(*parts: int) -> int:
    """63 bits."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def pack(
    answers: Sequence[Drawn], names: Sequence[str], *, rows: int, length: int, device: torch.device
) -> list[MicroBatch]:
    """Prompts with their answers as documents of rows of `length` tokens, `rows` a micro-batch; at least one of these,
    of padding where there are no answers. A turn whose prompt goes on from the turn before is in one document with it.

    Targets are the tokens that were sampled, in every turn, and none of those between. names: of `Drawn.values`,
    float32 [B, T] in `extra`. Recorded experts become `replay`.

    Raises:
        ValueError: a prompt with its answer is longer than a row.
    """
    packed: list[list[list[Said]]] = [[]]
    room = length
    for document in [document for one in answers for document in documents(one)]:
        needed = document[-1].length
        if needed > length:
            raise ValueError(
                f"objective.max_tokens: a prompt and its answer have {needed + 1:,} tokens, and "
                f"data.sequence_length={length:,}"
            )
        if needed > room:
            packed.append([])
            room = length
        packed[-1].append(document)
        room -= needed
    parts = [packed[start : start + rows] for start in range(0, len(packed), rows)]
    return [_micro_batch(part, names, (rows, length)).map(lambda tensor: tensor.to(device)) for part in parts]


def documents(one: Drawn) -> Iterator[list[Said]]:
    """The turns of a rollout, those together whose prompts each begin with all of the turn before."""
    document: list[Said] = []
    read: list[int] = []
    start = 0
    for turn in one.rollout.turns:
        end = start + len(turn.ids)
        values = {name: v if isinstance(v, float | int) else v[start:end] for name, v in one.values.items()}
        if document and turn.prompt[: len(read)] != read:
            yield document
            document = []
        document.append(Said(turn, values))
        read, start = [*turn.prompt, *turn.ids], end
    yield document


def _micro_batch(rows: Sequence[Sequence[Sequence[Said]]], names: Sequence[str], shape: tuple[int, int]) -> MicroBatch:
    tokens, positions, numbers, domains = (torch.zeros(shape, dtype=torch.int64) for _ in range(4))
    targets = torch.full(shape, IGNORE)
    extra = {name: torch.zeros(shape) for name in names}
    recorded = {
        name: torch.full((*shape, len(experts[0])), -1)
        for document in rows[0][:1]  # all have the same layers
        for name, experts in document[0].turn.experts.items()
    }
    for b, row in enumerate(rows):
        start = 0
        for number, document in enumerate(row, start=1):
            last = document[-1]
            end = start + last.length
            tokens[b, start:end] = torch.tensor([*last.turn.prompt, *last.turn.ids[:-1]])
            positions[b, start:end] = torch.arange(last.length)
            numbers[b, start:end] = number
            read = 0  # positions of the turns before, whose experts stand
            for said in document:
                answer = slice(start + len(said.turn.prompt) - 1, start + said.length)
                targets[b, answer] = torch.tensor(said.turn.ids)
                for name in names:
                    extra[name][b, answer] = torch.tensor(said.values[name])
                for name, experts in said.turn.experts.items():
                    recorded[name][b, start + read : start + said.length] = torch.tensor(experts[read : said.length])
                read = said.length
            start = end
    return MicroBatch(tokens, targets, positions, numbers, domains, extra, recorded)
