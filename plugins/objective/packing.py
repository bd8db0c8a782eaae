"""Sampled answers as packed rows: how they are drawn, and the micro-batches that are made of them."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from dsv3.contracts import IGNORE, MicroBatch, Models, Prompt, Rollout


class Drawn(NamedTuple):
    """A prompt with one answer, and what a loss needs at the positions of the answer's tokens."""

    prompt: Prompt
    rollout: Rollout
    values: Mapping[str, float | Sequence[float]]  # one for all tokens, or one for each


def draw(
    prompts: Sequence[Prompt], models: Models, *, count: int, seed: int, max_tokens: int, temperature: float
) -> list[Rollout]:
    """`count` answers to each prompt, one prompt after another, by the policy as it is now.

    Random numbers follow from seed, prompt and number of the answer: they are the same on any number of ranks.
    """
    seeds = [seed_of(seed, prompt.number, number) for prompt in prompts for number in range(count)]
    ids = [prompt.ids for prompt in prompts for _ in range(count)]
    return models.sample(ids, seeds, max_tokens=max_tokens, temperature=temperature)


def seed_of(*parts: int) -> int:
    """63 bits."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1


def pack(
    answers: Sequence[Drawn], names: Sequence[str], *, rows: int, length: int, device: torch.device
) -> list[MicroBatch]:
    """Prompts with their answers as documents of rows of `length` tokens, `rows` a micro-batch; at least one of these,
    of padding where there are no answers.

    Targets are the answers' tokens, as they were sampled. names: of `Drawn.values`, float32 [B, T] in `extra`.

    Raises:
        ValueError: a prompt with its answer is longer than a row.
    """
    packed: list[list[Drawn]] = [[]]
    room = length
    for one in answers:
        needed = len(one.prompt.ids) + len(one.rollout.ids) - 1
        if needed > length:
            raise ValueError(
                f"objective.max_tokens: a prompt and its answer have {needed + 1:,} tokens, and "
                f"data.sequence_length={length:,}"
            )
        if needed > room:
            packed.append([])
            room = length
        packed[-1].append(one)
        room -= needed
    parts = [packed[start : start + rows] for start in range(0, len(packed), rows)]
    return [_micro_batch(part, names, (rows, length)).map(lambda tensor: tensor.to(device)) for part in parts]


def _micro_batch(rows: Sequence[Sequence[Drawn]], names: Sequence[str], shape: tuple[int, int]) -> MicroBatch:
    tokens, positions, documents, domains = (torch.zeros(shape, dtype=torch.int64) for _ in range(4))
    targets = torch.full(shape, IGNORE)
    extra = {name: torch.zeros(shape) for name in names}
    for b, row in enumerate(rows):
        start = 0
        for number, one in enumerate(row, start=1):
            ids = torch.tensor([*one.prompt.ids, *one.rollout.ids])
            end = start + len(ids) - 1
            answer = slice(start + len(one.prompt.ids) - 1, end)
            tokens[b, start:end] = ids[:-1]
            targets[b, answer] = ids[len(one.prompt.ids) :]
            positions[b, start:end] = torch.arange(len(ids) - 1)
            documents[b, start:end] = number
            for name in names:
                extra[name][b, answer] = torch.tensor(one.values[name])
            start = end
    return MicroBatch(tokens, targets, positions, documents, domains, extra)
