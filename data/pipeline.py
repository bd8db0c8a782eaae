"""The training stream, on Grain: documents -> packed sequences -> shuffle within a window -> mixture of domains.

Each domain has a stream of its own. Its documents come in an order that is drawn anew every epoch. Packing lays them
end to end and cuts rows of T + 1 tokens that overlap by one: every token is a target once. Rows are shuffled within a
window, or a step would be a few long documents. The mixture takes the next row from the domain that is furthest behind
its share of the rows given out so far: every step has the same shares, to within a row. All of it runs in this
process, and its state is a few integers: the rows given out, and of each domain the position in its order and the
place in the current document and window.
"""

import logging
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

logging.getLogger("absl").setLevel(logging.ERROR)  # Grain's import warns that there is no jax profiler
import grain  # noqa: E402

from data.cache import number  # noqa: E402
from data.corpus import DomainTokens  # noqa: E402
from data.fim import FillInTheMiddle, chosen, generator, rearrange  # noqa: E402
from data.tokenizer import ByteLevelBPE  # noqa: E402

FIM, SPLITTING = 0, 1
"""Purposes of a document's random numbers."""


class Pack(NamedTuple):
    """A row of T + 1 tokens."""

    tokens: np.ndarray  # int64
    domain: int


class Rendering:
    """A training document as it is seen in one epoch: ordinary, rearranged, with some joined tokens split."""

    def __init__(
        self, *, tokenizer: ByteLevelBPE, seed: int, fim: FillInTheMiddle, split_punctuation_newline: float
    ) -> None:
        self._tokenizer = tokenizer
        self._seed = seed
        self._fim = fim
        self._split_share = split_punctuation_newline
        self._halves = joined_tokens(tokenizer) if split_punctuation_newline > 0 else {}
        self._is_joined = np.zeros(tokenizer.vocab_size, dtype=bool)
        self._is_joined[list(self._halves)] = True

    def __call__(self, domain: DomainTokens, index: int, epoch: int) -> np.ndarray:
        """Token ids (int64) of document `index` of `domain` in `epoch`, from BOS to EOS."""
        document = int(domain.numbers[index])
        random = generator(seed=self._seed, epoch=epoch, document=document, purpose=FIM)
        if chosen(rate=self._fim.rate, random=random):
            text = domain.texts[index]["text"]
            ids = rearrange(text, settings=self._fim, random=random, tokenizer=self._tokenizer)
            tokens = np.array(ids, dtype=np.int64)
        else:
            tokens = domain.document(index).astype(np.int64)
        if not self._halves:
            return tokens
        random = generator(seed=self._seed, epoch=epoch, document=document, purpose=SPLITTING)
        return self._split(tokens, random)

    def _split(self, tokens: np.ndarray, random: np.random.Generator) -> np.ndarray:
        places = np.flatnonzero(self._is_joined[tokens])
        places = places[random.random(len(places)) < self._split_share]
        parts = np.split(tokens, np.stack([places, places + 1], axis=1).ravel())
        for i in range(1, len(parts), 2):
            parts[i] = np.array(self._halves[int(parts[i][0])], dtype=np.int64)
        return np.concatenate(parts)


def joined_tokens(tokenizer: ByteLevelBPE) -> dict[int, list[int]]:
    """The tokens that join punctuation and line breaks, each with the ids of the two parts."""
    found = {}
    for index, data in enumerate(tokenizer.token_bytes()):
        head = data.rstrip(b"\r\n")
        if len(head) < len(data) and head.strip() and not any(chr(byte).isalnum() for byte in head):
            found[index] = tokenizer.encode_bytes(head) + tokenizer.encode_bytes(data[len(head) :])
    return found


class Packing(grain.IterDataset):
    """Rows of `length + 1` tokens from documents; each begins with the last token of the one before."""

    def __init__(self, parent: grain.IterDataset, *, length: int) -> None:
        super().__init__(parent)
        self._length = length

    def __iter__(self) -> grain.DatasetIterator:
        return _PackingIterator(iter(self._parent), self._length)


class _Open(NamedTuple):
    """A document not yet wholly packed."""

    state: dict[str, Any]  # of the parent, before it gave the document
    start: int  # tokens of it that are packed
    rest: np.ndarray


class _PackingIterator(grain.DatasetIterator):
    def __init__(self, parent: grain.DatasetIterator, length: int) -> None:
        super().__init__(parent)
        self._length = length
        self._open: deque[_Open] = deque()
        self._skip = 0  # tokens of the next document that were packed before the state was restored

    def __next__(self) -> np.ndarray:
        available = sum(len(document.rest) for document in self._open)
        while available < self._length + 1:
            state = self._parent.get_state()
            document = _Open(state, self._skip, next(self._parent)[self._skip :])
            self._skip = 0
            self._open.append(document)
            available += len(document.rest)
        tokens = np.concatenate([document.rest for document in self._open])
        self._drop(self._length)
        return tokens[: self._length + 1]

    def _drop(self, count: int) -> None:
        while count >= len(self._open[0].rest):
            count -= len(self._open.popleft().rest)
        state, start, rest = self._open[0]
        self._open[0] = _Open(state, start + count, rest[count:])

    def get_state(self) -> dict[str, Any]:
        if self._open:
            return {"parent": self._open[0].state, "start": self._open[0].start}
        return {"parent": self._parent.get_state(), "start": self._skip}

    def set_state(self, state: dict[str, Any]) -> None:
        self._parent.set_state(state["parent"])
        self._skip = state["start"]
        self._open.clear()


class Mixture(grain.IterDataset):
    """Rows of several domains by their shares."""

    def __init__(self, parents: Sequence[grain.IterDataset], *, weights: Sequence[float]) -> None:
        super().__init__(parents)
        self._weights = weights

    def __iter__(self) -> grain.DatasetIterator:
        return _MixtureIterator([iter(parent) for parent in self._parents], self._weights)


class _MixtureIterator(grain.DatasetIterator):
    def __init__(self, parents: Sequence[grain.DatasetIterator], weights: Sequence[float]) -> None:
        super().__init__(parents)
        self._shares = [weight / sum(weights) for weight in weights]
        self._given = [0] * len(parents)  # rows of each domain

    def __next__(self) -> Pack:
        rows = sum(self._given) + 1
        behind = max(range(len(self._given)), key=lambda d: rows * self._shares[d] - self._given[d])
        self._given[behind] += 1
        return Pack(next(self._parents[behind]), behind)

    def get_state(self) -> dict[str, Any]:
        return {"parents": [parent.get_state() for parent in self._parents], "given": list(self._given)}

    def set_state(self, state: dict[str, Any]) -> None:
        for parent, parent_state in zip(self._parents, state["parents"], strict=True):
            parent.set_state(parent_state)
        self._given = list(state["given"])


def training_rows(
    *,
    domains: Mapping[str, DomainTokens],
    weights: Mapping[str, float],
    rendering: Rendering,
    sequence_length: int,
    shuffle_window: int,
    seed: int,
) -> grain.IterDataset:
    """Endless rows of sequence_length + 1 tokens, each domain's shuffled within windows of `shuffle_window`."""

    def rows(name: str, domain: DomainTokens) -> grain.IterDataset:
        packed = Packing(_documents(name, domain, rendering, seed), length=sequence_length)
        return grain.experimental.WindowShuffleIterDataset(packed, window_size=shuffle_window, seed=seed)

    streams = [rows(name, domain) for name, domain in domains.items()]
    return Mixture(streams, weights=[weights[name] for name in domains])


def _documents(name: str, domain: DomainTokens, rendering: Rendering, seed: int) -> grain.IterDataset:
    """The rendered documents of one domain, epoch after epoch, each epoch in another order."""
    count = len(domain.numbers)
    order_seed = number(f"{seed}/{name}") % 2**32
    order = grain.MapDataset.range(count).shuffle(seed=order_seed).repeat(reseed_each_epoch=True)

    def render(position: int, index: int) -> np.ndarray:
        return rendering(domain, index % count, position // count)

    return order.map_with_index(render).to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
