"""Held-out data: validation sequences with their byte counts, and questions scored by exact match."""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from data.batches import micro_batch
from data.documents import HeldOut
from data.fim import pieces
from data.telling import lines_of
from dsv3.contracts import MicroBatch, Question, Tokenizer

T = TypeVar("T")

CHARACTERS_PER_TOKEN = 3
"""Turns `validation_tokens` into a length of text, so that every tokenizer is measured on the same text."""


class ValidationText(NamedTuple):
    """The beginning of a held-out document, or all of it."""

    text: str
    ends: bool  # whether the document ends here


def validation_texts(texts: Sequence[str], *, validation_tokens: int) -> list[ValidationText]:
    """The first held-out `texts` that make up 3 * `validation_tokens` characters together (or all there are).

    Nothing here depends on the tokenizer or on a seed.
    """
    left = CHARACTERS_PER_TOKEN * validation_tokens
    chosen = []
    for text in texts:
        if left <= 0:
            break
        taken = text[:left]
        chosen.append(ValidationText(taken, len(taken) == len(text)))
        left -= len(taken)
    return chosen


def validation_bytes(texts: Sequence[ValidationText]) -> int:
    """UTF-8 bytes of the text whose tokens are targets."""
    return sum(len(text.encode("utf-8")) for text, _ in texts)


def validation_rows(texts: Sequence[ValidationText], *, tokenizer: Tokenizer, length: int) -> np.ndarray:
    """Rows of `length + 1` tokens (int64) in which every token but the first is a target once.

    Each text is `<bos> text <eos>`, without the EOS where it is cut. Rows overlap by one token; the last is padded.
    """
    stream: list[int] = []
    for (_, ends), ids in zip(texts, tokenizer.encode_batch([text for text, _ in texts])):
        stream += [tokenizer.bos, *ids] + [tokenizer.eos] * ends
    n_rows = -(-(len(stream) - 1) // length)
    padded = np.full(n_rows * length + 1, tokenizer.pad, dtype=np.int64)
    padded[: len(stream)] = stream
    return np.lib.stride_tricks.sliding_window_view(padded, length + 1)[::length].copy()


def validation_batches(
    rows: Mapping[int, np.ndarray], *, tokenizer: Tokenizer, micro_batch_size: int, isolate: bool
) -> Iterator[MicroBatch]:
    """Micro-batches (the last may be smaller) of the rows of each domain, by the domain's index.

    Targets are the tokens of the texts and their EOS; BOS and padding are none.
    """
    all_rows = np.concatenate(list(rows.values()))
    domains = np.repeat(list(rows), [len(of_domain) for of_domain in rows.values()])
    for start in range(0, len(all_rows), micro_batch_size):
        tokens = all_rows[start : start + micro_batch_size]
        domain = np.broadcast_to(domains[start : start + micro_batch_size, None], tokens.shape)
        yield micro_batch(tokens, domain, tokenizer=tokenizer, isolate=isolate, bos_is_target=False)


def questions(
    held_out: Iterable[HeldOut], majority: Mapping[str, str], *, count: int, tokenizer: Tokenizer
) -> list[Question]:
    """`count` held-out questions, as many of each family as there can be; none where no source asks questions.

    A prompt ends in `Answer:`, and the ids of prompt and answer together are those of the document. majority: of each
    family, the most frequent answer in training.

    Raises:
        ValueError: the sources hold out fewer questions.
    """
    queues: dict[str, list[Question]] = defaultdict(list)
    for document in held_out:
        if family := document.family:
            prompt = document.text.removesuffix(f" {document.answer}")
            queues[family].append(Question(family, prompt, f" {document.answer}", f" {majority.get(family, '')}"))
    available = sum(map(len, queues.values()))
    if queues and available < count:
        raise ValueError(f"data.questions={count}: must be at most {available}, the questions held out")
    chosen = evenly(list(queues.values()), count)
    for question in chosen:
        parts = tokenizer.encode(question.prompt) + tokenizer.encode(question.answer)
        assert parts == tokenizer.encode(question.prompt + question.answer), question
    return chosen


def evenly(queues: Sequence[Sequence[T]], count: int) -> list[T]:
    """The first of each queue, the second of each, and so on, `count` in all; queue after queue in the result."""
    taken = [0] * len(queues)
    for _ in range(min(count, sum(map(len, queues)))):
        shortest = min((i for i in range(len(queues)) if taken[i] < len(queues[i])), key=lambda i: (taken[i], i))
        taken[shortest] += 1
    return [each for queue, length in zip(queues, taken) for each in queue[:length]]


def three_parts(text: str, *, longest: int) -> tuple[str, str, str]:
    """Prefix, suffix and middle of an excerpt of at most `longest` characters; the middle is one line.

    The excerpt begins at the text's first Python function, where it has one. The line is the one nearest the excerpt's
    centre that is long enough to tell something; its indentation and line break stay outside.
    """
    function = re.search(r"^def ", text, flags=re.MULTILINE)
    excerpt = next(pieces([text[function.start() if function else 0 :]], longest))
    lines = excerpt.splitlines(keepends=True)
    starts = np.cumsum([0, *map(len, lines)]).tolist()
    telling = [i for i, line in enumerate(lines) if line.strip() in lines_of(line)] or range(len(lines))
    chosen = min(telling, key=lambda i: abs(starts[i] + starts[i + 1] - len(excerpt)))
    line = lines[chosen]
    first = starts[chosen] + len(line) - len(line.lstrip())
    last = starts[chosen] + len(line.rstrip())
    return excerpt[:first], excerpt[last:], excerpt[first:last]
