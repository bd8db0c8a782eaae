"""Steps of a run: rows by number, dealt to ranks as micro-batches, with the data state after each step."""

import itertools
import logging
import threading
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import lightning

logging.getLogger("absl").setLevel(logging.ERROR)  # Grain's import warns that there is no jax profiler
import grain  # noqa: E402

from data.layout import Row, Rows  # noqa: E402
from dsv3.contracts import MicroBatch, Schedule, Step  # noqa: E402

PREFETCHED = 64
"""Rows read ahead, by a thread, or one step."""


class StepModule(lightning.LightningDataModule):
    """A datamodule whose steps are made of rows that it has by number; what the rows are, its subclasses say.

    Lightning loads one batch ahead of training, so the datamodule itself has no state to save: the state that
    continues after a step is the step's `state_after`, and `restore` takes it.
    """

    def __init__(self, *, micro_batch_size: int, global_batch_size: Schedule, total_tokens: int) -> None:
        super().__init__()
        for key, value in {"micro_batch_size": micro_batch_size, "total_tokens": total_tokens}.items():
            if value < 1:
                raise ValueError(f"data.{key}={value}: must be at least 1")
        self.micro_batch_size, self.total_tokens = micro_batch_size, total_tokens
        self._global_batch_size = global_batch_size
        self._restored: Mapping[str, Any] | None = None
        self._rank, self._ranks = 0, 1

    @abstractmethod
    def rows(self) -> Rows:
        """The endless stream of rows."""

    @abstractmethod
    def stream_key(self) -> str:
        """Equal for configurations that give the same endless stream of rows."""

    @abstractmethod
    def batch(self, rows: list[Row]) -> MicroBatch:
        """Rows as a micro-batch; if they are too few for one, rows of padding follow, so that all have one shape."""

    def train_dataloader(self) -> "Steps":
        """Steps from the restored state (or the beginning) until the token budget is spent; can be iterated anew."""
        return Steps(self)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue after the step whose `state_after` this is.

        Raises:
            ValueError: the state belongs to other data or another order of it.
        """
        if state["stream"] != self.stream_key():
            raise ValueError(
                "the data state was saved with other texts, tokenizer, seed, weights, sequence_length, packing, fim or "
                "split_punctuation_newline than the configuration has now"
            )
        self._restored = state

    def share(self, rank: int, of: int) -> None:
        """Of the micro-batches of each step, give those whose number is `rank` modulo `of`."""
        self._rank, self._ranks = rank, of

    def steps(self) -> Iterator[Step]:
        """Steps from where the datamodule stands. A rank reads its own rows only."""
        rows, key = self.rows(), self.stream_key()
        tokens = given = 0
        if self._restored is not None:
            tokens, given = self._restored["tokens"], sum(self._restored["rows"])
        shares = _Shares(self, rows, tokens, given)
        ahead = grain.MapDataset.source(shares).to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=shares.steps_ahead(PREFETCHED))
        )
        for share in itertools.takewhile(lambda share: share.micro_batches, ahead):
            state = {"stream": key, "tokens": share.tokens_after, "rows": rows.given(share.rows_after)}
            parts = [self.batch(part) for part in share.micro_batches]
            yield Step(parts, share.tokens_before, state, share.filled)

    def rows_per_step(self, tokens: int) -> int:
        """Rows of the step that begins after `tokens`: the schedule's value, rounded."""
        return max(1, round(self._global_batch_size(tokens)))

    def own_parts(self, count: int) -> list[range]:
        """The rows of a step of `count` that this rank has, by micro-batch; empty ones are padding."""
        size = self.micro_batch_size
        parts = [range(start, min(start + size, count)) for start in range(0, count, size)]
        each = -(-len(parts) // self._ranks)
        return [parts[i] if i < len(parts) else range(0) for i in range(self._rank, each * self._ranks, self._ranks)]


class _Share(NamedTuple):
    """What one rank has of a step."""

    micro_batches: list[list[Row]]
    filled: int  # of them, the last ones, that are padding
    tokens_before: int
    tokens_after: int
    rows_after: int


class _Shares:
    """A rank's shares of the steps from the one that begins after `tokens` and `rows` on, by number.

    Once the token budget is spent, they have no micro-batches.
    """

    def __init__(self, data: StepModule, rows: Rows, tokens: int, given: int) -> None:
        self._data, self._rows = data, rows
        self._starts = [(tokens, given)]  # tokens and rows before each step; the last is where the next would begin
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, number: int) -> _Share:
        (before, first), (after, last) = self._start(number), self._start(number + 1)
        parts = self._data.own_parts(last - first)
        micro_batches = [[self._rows[first + row] for row in part] for part in parts]
        return _Share(micro_batches, sum(not part for part in parts), before, after, last)

    def steps_ahead(self, rows: int) -> int:
        """As many as have about so many rows of this rank, at least one."""
        tokens, _ = self._starts[0]
        own = sum(map(len, self._data.own_parts(self._data.rows_per_step(tokens))))
        return max(1, rows // max(1, own))

    def _start(self, number: int) -> tuple[int, int]:
        with self._lock:
            while len(self._starts) <= number:
                tokens, given = self._starts[-1]
                count = self._data.rows_per_step(tokens) if tokens < self._data.total_tokens else 0
                tokens += sum(self._rows.tokens(row) for row in range(given, given + count))
                self._starts.append((tokens, given + count))
            return self._starts[number]


class Steps:
    """The training steps; each iteration begins where the datamodule stands."""

    def __init__(self, data: StepModule) -> None:
        self._data = data

    def __iter__(self) -> Iterator[Step]:
        return self._data.steps()
