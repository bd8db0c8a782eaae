"""The datamodule: one Lightning batch is one optimiser step, and carries the data state after it."""

import itertools
import logging
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import lightning
import numpy as np

logging.getLogger("absl").setLevel(logging.ERROR)  # Grain's import warns that there is no jax profiler
import grain  # noqa: E402

from data.batches import micro_batch  # noqa: E402
from data.documents import HeldOut  # noqa: E402
from data.fim import FillInTheMiddle  # noqa: E402
from data.held_out import (  # noqa: E402
    CHARACTERS_PER_TOKEN,
    questions,
    three_parts,
    validation_batches,
    validation_bytes,
    validation_rows,
    validation_texts,
)
from data.layout import Packing, Row, Rows  # noqa: E402
from data.older_split import older_held_out  # noqa: E402
from data.preparation import Prepared, TokenizerFactory, corpus_key, prepare, settings  # noqa: E402
from data.sources import Source  # noqa: E402
from data.survey import read_survey  # noqa: E402
from dsv3.bounds import ArgumentsOf, Fraction, NonNegativeInt, PositiveInt, Seed  # noqa: E402
from dsv3.contracts import MicroBatch, Question, Sample, Schedule, Step, Tokenizer  # noqa: E402

CORPUS = "corpus.txt"
"""Beside held-out texts: the key of the corpus that they were held out from."""

OLDER = "windows"
"""`packing` of runs of an older version, whose rows were shuffled within windows: no option, but read."""

PREFETCHED = 64
"""Rows read ahead, by a thread, or one step."""


class DataModule(lightning.LightningDataModule):
    """Texts of several domains as `Step`s of packed rows; satisfies `dsv3.contracts.Data`.

    Lightning loads one batch ahead of training, so the datamodule itself has no state to save: the state that
    continues after a step is the step's `state_after`, and `restore` takes it.
    """

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
        packing: Packing,
        isolate_documents: bool,
        held_out_fraction: Fraction,
        held_out_bytes: PositiveInt,
        max_document_bytes: PositiveInt,
        validation_tokens: PositiveInt,
        questions: NonNegativeInt,
        fim: Annotated[Mapping[str, Any], ArgumentsOf(FillInTheMiddle)],
        split_punctuation_newline: Fraction,
        processes: PositiveInt | None,
        sources: Mapping[str, Source | None],
    ) -> None:
        """See conf/data/default.yaml for what each argument means.

        Raises:
            ValueError: a value is out of its range; the message names its key.
        """
        super().__init__()
        self.settings = settings(
            seed=seed,
            cache_dir=cache_dir,
            sequence_length=sequence_length,
            total_tokens=total_tokens,
            packing=packing,
            held_out_fraction=held_out_fraction,
            held_out_bytes=held_out_bytes,
            max_document_bytes=max_document_bytes,
            fim=fim,
            split_punctuation_newline=split_punctuation_newline,
            processes=processes,
            sources=sources,
        )
        for key, value in {"micro_batch_size": micro_batch_size, "validation_tokens": validation_tokens}.items():
            if value < 1:
                raise ValueError(f"data.{key}={value}: must be at least 1")
        self._tokenizer_factory = tokenizer
        self._micro_batch_size = micro_batch_size
        self._global_batch_size = global_batch_size
        self._isolate = isolate_documents
        self._validation_tokens = validation_tokens
        self._n_questions = questions
        self._restored: Mapping[str, Any] | None = None
        self._rank, self._ranks = 0, 1
        self._prepared: Prepared | None = None
        self._held_out: dict[str, list[HeldOut]] = {}
        self._majority: dict[str, str] = {}
        self.domains = list(self.settings.sources)
        self.tokenizer: Tokenizer

    def prepare_data(self) -> None:
        """Make whatever is not in the cache yet: held-out texts, tokenizer, token ids."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Load everything from the cache, making what is missing; a second call does nothing."""
        if str(self.settings.packing) == OLDER:
            self._set_up_older()
        elif self._prepared is None:
            prepared = self._prepared = prepare(self.settings, self._tokenizer_factory)
            self.tokenizer = prepared.tokenizer
            self._take_held_out(prepared.survey.folder)

    def _set_up_older(self) -> None:
        """Of a run whose rows were shuffled within windows there is only what it held out."""
        if not self._held_out:
            self.tokenizer = self._tokenizer_factory(texts={}, cache_dir=str(self.settings.cache_dir))
            self._held_out, self._majority = older_held_out(
                self.settings.sources,
                share=self.settings.held_out_fraction,
                longest=self.settings.max_document_bytes,
            )

    def keep_held_out(self, folder: Path) -> None:
        """Copy the held-out texts into a folder, for `use_held_out`; files of one file system share the space."""
        kept = self.prepared.survey
        if (folder / CORPUS).is_file() and (folder / CORPUS).read_text().strip() == kept.key:
            return
        beside = folder.with_name(f".{folder.name}.{os.getpid()}")
        beside.mkdir(parents=True)
        for file in sorted(kept.folder.iterdir()):
            if file.name in ("survey.json", "contents.npy") or file.name.endswith(".held_out.parquet"):
                try:
                    os.link(file, beside / file.name)
                except OSError:
                    shutil.copyfile(file, beside / file.name)
        (beside / CORPUS).write_text(kept.key + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        beside.rename(folder)

    def use_held_out(self, folder: Path) -> str | None:
        """Take the held-out texts from where `keep_held_out` put them, instead of `setup`: no corpus is needed.

        Returns what there is to say: that the corpus is gone, or is another one than the texts were held out from.
        """
        self.tokenizer = self._tokenizer_factory(texts={}, cache_dir=str(self.settings.cache_dir))
        self._take_held_out(folder)
        try:
            changed = corpus_key(self.settings) != (folder / CORPUS).read_text().strip()
        except (ValueError, OSError) as error:
            return f"the training texts are not here any more ({error}); the text that the run held out is scored"
        return "the training texts have changed since; the text that the run held out is scored" if changed else None

    def _take_held_out(self, folder: Path) -> None:
        found = read_survey(folder)
        self._held_out = {name: found.held_out(name) for name in self.domains}
        self._majority = {family: best for domain in found.domains.values() for family, best in domain.majority.items()}

    def train_dataloader(self) -> "Steps":
        """Steps from the restored state (or the beginning) until the token budget is spent; can be iterated anew."""
        return Steps(self)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue after the step whose `state_after` this is.

        Raises:
            ValueError: the state belongs to other data or another order of it.
        """
        if isinstance(state.get("rows"), Mapping):
            raise ValueError(
                "the run began with a version that shuffled rows within windows, and its order of rows cannot be "
                "continued: resume=never starts it anew"
            )
        if state["stream"] != self.stream_key():
            raise ValueError(
                "the data state was saved with other texts, tokenizer, seed, weights, sequence_length, packing, fim or "
                "split_punctuation_newline than the configuration has now"
            )
        self._restored = state

    def stream_key(self) -> str:
        """Equal for configurations that give the same endless stream of rows."""
        return self.prepared.stream_key()

    @property
    def prepared(self) -> Prepared:
        """What lies on disk for this run."""
        self.setup()
        if self._prepared is None:
            raise ValueError("data.packing=windows: the rows of an older run can be scored, and not trained on")
        return self._prepared

    def share(self, rank: int, of: int) -> None:
        """Of the micro-batches of each step, give those whose number is `rank` modulo `of`."""
        self._rank, self._ranks = rank, of

    def steps(self) -> Iterator[Step]:
        """Steps from where the datamodule stands. A rank reads its own rows only."""
        rows, key = self.prepared.rows(), self.stream_key()
        tokens = given = 0
        if self._restored is not None:
            tokens, given = self._restored["tokens"], sum(self._restored["rows"])
        shares = _Shares(self, rows, tokens, given)
        ahead = grain.MapDataset.source(shares).to_iter_dataset(
            grain.ReadOptions(num_threads=1, prefetch_buffer_size=shares.steps_ahead(PREFETCHED))
        )
        for share in itertools.takewhile(lambda share: share.micro_batches, ahead):
            state = {"stream": key, "tokens": share.tokens_after, "rows": rows.given(share.rows_after)}
            parts = [self._batch(part) for part in share.micro_batches]
            yield Step(parts, share.tokens_before, state, share.filled)

    def rows_per_step(self, tokens: int) -> int:
        """Rows of the step that begins after `tokens`: the schedule's value, rounded."""
        return max(1, round(self._global_batch_size(tokens)))

    def validation_batches(self) -> Iterator[MicroBatch]:
        """The first held-out texts of each domain, without fill-in-the-middle; a domain has rows of its own."""
        rows = {
            i: validation_rows(texts, tokenizer=self.tokenizer, length=self.settings.sequence_length)
            for i, texts in enumerate(self._validation_texts().values())
        }
        return validation_batches(
            rows, tokenizer=self.tokenizer, micro_batch_size=self._micro_batch_size, isolate=self._isolate
        )

    def validation_bytes(self) -> Mapping[str, int]:
        """UTF-8 bytes of the validation text of each domain. (An EOS is a target that has no bytes.)"""
        return {name: validation_bytes(texts) for name, texts in self._validation_texts().items()}

    def questions(self) -> list[Question]:
        """The fixed held-out questions; empty where no source asks any."""
        held_out = (document for domain in self._texts().values() for document in domain)
        return questions(held_out, self._majority, count=self._n_questions, tokenizer=self.tokenizer)

    def held_out_documents(self, domain: str) -> list[str]:
        """All held-out texts of a domain, those of the validation set first."""
        return [document.text for document in self._texts()[domain]]

    def samples(self) -> list[Sample]:
        """One line of the first held-out text of the first domain, to be written after what comes before it, and with
        what comes after it too."""
        excerpt = self.settings.sequence_length * CHARACTERS_PER_TOKEN // 2  # fits in a row with room for the middle
        prefix, suffix, real = three_parts(self.held_out_documents(self.domains[0])[0], longest=excerpt)
        return [Sample("completion", prefix, None, real), Sample("infilling", prefix, suffix, real)]

    def _texts(self) -> dict[str, list[HeldOut]]:
        if not self._held_out:
            self.setup()
        return self._held_out

    def _validation_texts(self) -> dict[str, Any]:
        return {
            name: validation_texts(self.held_out_documents(name), validation_tokens=self._validation_tokens)
            for name in self.domains
        }

    def own_parts(self, count: int) -> list[range]:
        """The rows of a step of `count` that this rank has, by micro-batch; empty ones are padding."""
        size = self._micro_batch_size
        parts = [range(start, min(start + size, count)) for start in range(0, count, size)]
        each = -(-len(parts) // self._ranks)
        return [parts[i] if i < len(parts) else range(0) for i in range(self._rank, each * self._ranks, self._ranks)]

    def _batch(self, rows: list[Row]) -> MicroBatch:
        """Rows as a micro-batch; if they are too few for one, rows of padding follow, so that all have one shape."""
        blank = Row(np.full(self.settings.sequence_length + 1, self.tokenizer.pad), domain=0)
        rows = rows + [blank] * (self._micro_batch_size - len(rows))
        tokens = np.stack([row.tokens for row in rows])
        domains = np.broadcast_to(np.array([[row.domain] for row in rows]), tokens.shape)
        return micro_batch(tokens, domains, tokenizer=self.tokenizer, isolate=self._isolate, bos_is_target=True)


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

    def __init__(self, data: DataModule, rows: Rows, tokens: int, given: int) -> None:
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
                count = self._data.rows_per_step(tokens) if tokens < self._data.settings.total_tokens else 0
                tokens += sum(self._rows.tokens(row) for row in range(given, given + count))
                self._starts.append((tokens, given + count))
            return self._starts[number]


class Steps:
    """The training steps; each iteration begins where the datamodule stands."""

    def __init__(self, data: DataModule) -> None:
        self._data = data

    def __iter__(self) -> Iterator[Step]:
        return self._data.steps()
