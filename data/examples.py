"""The datamodule of examples: whole documents with marks of what is trained on, packed in rows that isolate them."""

import contextlib
import logging
import shutil
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from data.batches import micro_batch
from data.cache import cached, digest, rebuilt
from data.example_sources import ExampleSource, example_files
from data.example_store import (
    TRAINED,
    Example,
    StoredExamples,
    epoch_of_examples,
    packed_in_order,
    read_examples,
    write_examples,
)
from data.held_out import evenly
from data.layout import DomainRows, Epoch, Row, Rows, mixture
from data.preparation import TokenizerFactory
from data.stepping import StepModule
from dsv3.bounds import Fraction, NonNegativeInt, PositiveInt, Seed
from dsv3.contracts import IGNORE, MicroBatch, Question, Sample, Schedule, Tokenizer
from dsv3.prompts.chat import Message

log = logging.getLogger(__name__)

VERSION = 1
"""Raised with every change of the code that changes what is kept for the same rows and settings."""

OWN = "examples"
"""The domain of data.path."""

SAMPLES = 3


class Stored(NamedTuple):
    training: StoredExamples
    held_out: StoredExamples


class ExampleModule(StepModule):
    """Examples of several domains as `Step`s of packed rows; satisfies `dsv3.contracts.Data`.

    A kind of data says how a row of its sources becomes an `Example`.
    """

    kind: str  # names what is kept in the cache

    def __init__(
        self,
        *,
        tokenizer: TokenizerFactory,
        seed: Seed,
        cache_dir: str | Path,
        sequence_length: PositiveInt,
        total_tokens: PositiveInt,
        micro_batch_size: PositiveInt,
        global_batch_size: Schedule,
        isolate_documents: bool,
        held_out_fraction: Fraction,
        validation_tokens: PositiveInt,
        questions: NonNegativeInt,
        fim: Mapping[str, Any],
        path: str | None,
        sources: Mapping[str, ExampleSource | None],
    ) -> None:
        """See conf/data/conversations.yaml for what each argument means.

        Raises:
            ValueError: a value is out of its range; the message names its key.
        """
        super().__init__(
            micro_batch_size=micro_batch_size, global_batch_size=global_batch_size, total_tokens=total_tokens
        )
        if not isolate_documents:
            raise ValueError("data.isolate_documents=false: must be true, so that examples do not see each other")
        if not 0 <= held_out_fraction < 1:
            raise ValueError(f"data.held_out_fraction={held_out_fraction}: must be from 0 to below 1")
        present = {name: source for name, source in sources.items() if source is not None}
        self.sources = {OWN: example_files(path)} if path is not None else present
        if not self.sources:
            raise ValueError("data.sources: must have at least one source, or data.path=FILE name rows of your own")
        mixture({name: source.weight for name, source in self.sources.items()})
        self.domains = list(self.sources)
        self.tokenizer: Tokenizer
        self._tokenizer_factory = tokenizer
        self._seed, self._cache_dir, self._length = seed, Path(cache_dir), sequence_length + 1
        self._held_out_fraction, self._validation_tokens = held_out_fraction, validation_tokens
        self._n_questions = questions
        self._training: dict[str, StoredExamples] = {}
        self._held_out: dict[str, StoredExamples] = {}

    @abstractmethod
    def example(self, row: Mapping[str, Any]) -> Example:
        """What a row becomes.

        Raises:
            ValueError: the row is none of this kind; says what is wrong with it.
        """

    @abstractmethod
    def texts(self, row: Mapping[str, Any]) -> Iterator[str]:
        """The texts of a row, which a tokenizer may be trained on."""

    def prepare_data(self) -> None:
        """Make whatever is not in the cache yet."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Load everything from the cache, making what is missing; a second call does nothing."""
        if self._training:
            return
        self.tokenizer = self._tokenizer_factory(
            texts={name: _Texts(self, source) for name, source in self.sources.items()}, cache_dir=str(self._cache_dir)
        )
        stored = {name: self._stored(name) for name in self.sources}
        self._training = {name: each.training for name, each in stored.items()}
        self._held_out = {name: each.held_out for name, each in stored.items()}
        for name, training in self._training.items():
            if longer := self.left_out(training):
                log.warning(
                    "%s: %s of %s examples are longer than data.sequence_length=%s and left out",
                    *(key_of(name), f"{longer:,}", f"{len(training.ends):,}", self._length - 1),
                )

    def left_out(self, training: StoredExamples) -> int:
        """How many examples of a domain do not fit a row."""
        return int((training.lengths() > self._length).sum())

    def _stored(self, name: str) -> Stored:
        folder = self._cache_dir / "examples"

        def build(building: Path) -> None:
            write_examples(building, self._examples(name), share=self._held_out_fraction)

        key = self._key(name)
        with self._naming(name):
            kept = cached(folder, key, f"the {self.kind} of {name}", build)
        return Stored(read_examples(kept / "training"), read_examples(kept / "held_out"))

    def _examples(self, name: str) -> Iterator[Example]:
        for where, row in self.sources[name].rows():
            try:
                refuse_mistyped(row)
                for text in self.texts(row):
                    text.encode()  # a lone surrogate, which JSON can write, is no Unicode
                yield self.example(row)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error

    @contextlib.contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Errors of a source name the key that it came from."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{key_of(name)}: {error}") from error

    def _key(self, name: str) -> str:
        with self._naming(name):
            identity = self.sources[name].identity()
        return digest([VERSION, self.kind, self.tokenizer.identity(), self._held_out_fraction, identity])

    def stream_key(self) -> str:
        """Equal for configurations that give the same endless stream of rows."""
        self.setup()
        stores = [(name, self._key(name), source.weight) for name, source in self.sources.items()]
        return digest([stores, self._seed, self._length])

    def rows(self) -> Rows:
        self.setup()
        domains = [
            DomainRows(
                name, seed=self._seed, length=self._length, pad=self.tokenizer.pad, epoch=self._epochs(name, training)
            )
            for name, training in self._training.items()
        ]
        return Rows(domains, mixture({name: source.weight for name, source in self.sources.items()}))

    def _epochs(self, name: str, training: StoredExamples) -> Any:
        def epoch(number: int) -> Epoch:
            return epoch_of_examples(training, seed=self._seed, domain=name, epoch=number, length=self._length)

        return epoch

    def batch(self, rows: list[Row]) -> MicroBatch:
        """Rows as a micro-batch; if they are too few for one, rows of padding follow, so that all have one shape."""
        blank = Row(np.full(self._length, self.tokenizer.pad), domain=0)
        rows = rows + [blank] * (self.micro_batch_size - len(rows))
        return self._micro_batch(np.stack([row.tokens for row in rows]), np.array([row.domain for row in rows]))

    def _micro_batch(self, marked: np.ndarray, domain_B: np.ndarray) -> MicroBatch:
        """Rows of T + 1 marked tokens; those that are not trained on are no targets."""
        marked = marked.astype(np.int64)
        domains = np.broadcast_to(domain_B[:, None], marked.shape)
        made = micro_batch(marked % TRAINED, domains, tokenizer=self.tokenizer, isolate=True, bos_is_target=False)
        trained_BT = torch.from_numpy(marked[:, 1:] >= TRAINED)
        return made._replace(targets_BT=made.targets_BT.masked_fill(~trained_BT, IGNORE))

    def validation_batches(self) -> Iterator[MicroBatch]:
        """The text that bits per byte are counted over."""
        return self.held_out_rows()

    def held_out_rows(self) -> Iterator[MicroBatch]:
        """The first held-out examples of each domain, as training reads them; a domain has rows of its own."""
        size = self.micro_batch_size
        for number, rows in enumerate(self._validation_rows().values()):
            for start in range(0, len(rows), size):
                part = rows[start : start + size]
                yield self._micro_batch(part, np.full(len(part), number))

    def validation_bytes(self) -> Mapping[str, int]:
        """UTF-8 bytes of what is trained on in each domain's held-out examples. (An EOS has none.)"""
        sizes = np.array([len(each) for each in self.tokenizer.token_bytes()])
        counts = dict.fromkeys(self.domains, 0)
        for micro in self.validation_batches():
            targets = micro.targets_BT[micro.targets_BT != IGNORE].numpy()
            counts[self.domains[int(micro.domains_BT[0, 0])]] += int(sizes[targets].sum())
        return counts

    def questions(self) -> list[Question]:
        """The fixed held-out questions with a short right answer, as many of each family as there can be."""
        queues: dict[str, list[Question]] = {}
        for stored in self._kept().values():
            for each in stored.facts["questions"]:
                if "family" in each:
                    family, best = each["family"], stored.facts["majority"].get(each["family"], "")
                    question = Question(family, each["prompt"], each["answer"], best, chat=True)
                    queues.setdefault(family, []).append(question)
        return evenly(list(queues.values()), self._n_questions)

    def samples(self) -> list[Sample]:
        """The first held-out message of each of the first domains, to be answered."""
        found = []
        for name, stored in self._kept().items():
            first = next((each for each in stored.facts["questions"] if each), None)
            if first is not None:
                found.append(Sample(name, first["prompt"], None, first["answer"], chat=True))
        return found[:SAMPLES]

    def keep_held_out(self, folder: Path) -> None:
        """Copy the held-out examples into a folder, for `use_held_out`."""
        with rebuilt(folder) as building:
            for name in self.sources:
                shutil.copytree(self._cache_dir / "examples" / self._key(name) / "held_out", building / name)

    def use_held_out(self, folder: Path) -> str | None:
        """Take the held-out examples from where `keep_held_out` put them, instead of `setup`: no source is read."""
        self.tokenizer = self._tokenizer_factory(texts={}, cache_dir=str(self._cache_dir))
        self._held_out = {name: read_examples(folder / name) for name in self.domains}
        return None

    def _kept(self) -> dict[str, StoredExamples]:
        if not self._held_out:
            self.setup()
        return self._held_out

    def _validation_rows(self) -> dict[str, np.ndarray]:
        return {
            name: packed_in_order(stored, length=self._length, tokens=self._validation_tokens, pad=self.tokenizer.pad)
            for name, stored in self._kept().items()
        }


def key_of(name: str) -> str:
    """The key that a domain's examples come from."""
    return "data.path" if name == OWN else f"data.sources.{name}"


def question_of(prompt: Sequence[Message], answer: str, row: Mapping[str, Any]) -> dict[str, str]:
    """The question of a row whose prompt is one message of the user's, with the row's family if it has one; else {}."""
    if len(prompt) != 1:
        return {}
    question = {"prompt": prompt[0].content, "answer": answer}
    return question | ({"family": row["family"]} if row.get("family") else {})


def refuse_mistyped(row: Mapping[str, Any]) -> None:
    """Raise ValueError where what rows of every kind may have is of another type."""
    held_out, family = row.get("held_out"), row.get("family")
    if not isinstance(held_out, bool | None):
        raise ValueError(f"held_out={held_out!r}: must be true or false")
    if not isinstance(family, str | None):
        raise ValueError(f"family={family!r}: must be text")


class _Texts:
    """The texts of a source, read when they are asked for."""

    def __init__(self, data: ExampleModule, source: ExampleSource) -> None:
        self._data, self._source = data, source

    def __iter__(self) -> Iterator[str]:
        for row in self._source.rows():
            yield from self._data.texts(row.row)
