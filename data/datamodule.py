"""The datamodule: one Lightning batch is one optimiser step, and carries the data state after it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Protocol

import lightning
import numpy as np

from data.batches import micro_batch
from data.cache import digest
from data.corpus import Corpus, DomainTokens, read_corpus, tokenise
from data.fim import FillInTheMiddle
from data.held_out import (
    CHARACTERS_PER_TOKEN,
    questions,
    three_parts,
    validation_batches,
    validation_bytes,
    validation_rows,
    validation_texts,
)
from data.pipeline import Pack, Rendering, training_rows
from data.sources import Source
from data.tokenizer import ByteLevelBPE
from dsv3.bounds import ArgumentsOf, Fraction, NonNegativeInt, PositiveInt, Seed
from dsv3.contracts import MicroBatch, Question, Sample, Schedule, Step


class TokenizerFactory(Protocol):
    """What conf/tokenizer/*.yaml gives: training texts of each domain -> tokenizer."""

    def __call__(self, *, texts: Mapping[str, Any], cache_dir: str) -> ByteLevelBPE: ...


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
        shuffle_window: PositiveInt,
        isolate_documents: bool,
        held_out_fraction: Fraction,
        validation_tokens: PositiveInt,
        questions: NonNegativeInt,
        fim: Annotated[Mapping[str, Any], ArgumentsOf(FillInTheMiddle)],
        split_punctuation_newline: Fraction,
        sources: Mapping[str, Source | None],
    ) -> None:
        """See conf/data/default.yaml for what each argument means.

        Raises:
            ValueError: a value is out of its range; the message names its key.
        """
        super().__init__()
        for key, value in {
            "sequence_length": sequence_length,
            "total_tokens": total_tokens,
            "micro_batch_size": micro_batch_size,
            "shuffle_window": shuffle_window,
            "validation_tokens": validation_tokens,
        }.items():
            if value < 1:
                raise ValueError(f"data.{key}={value}: must be at least 1")
        if not 0 <= split_punctuation_newline <= 1:
            raise ValueError(f"data.split_punctuation_newline={split_punctuation_newline}: must be between 0 and 1")
        present = {name: source for name, source in sources.items() if source is not None}
        if not present:
            raise ValueError("data.sources={}: must have at least one source")
        self._fim = FillInTheMiddle(**fim)
        self._fim.check()
        self._tokenizer_factory = tokenizer
        self._seed = seed
        self._cache_dir = Path(cache_dir)
        self._sequence_length = sequence_length
        self._total_tokens = total_tokens
        self._micro_batch_size = micro_batch_size
        self._global_batch_size = global_batch_size
        self._shuffle_window = shuffle_window
        self._isolate = isolate_documents
        self._held_out_fraction = held_out_fraction
        self._validation_tokens = validation_tokens
        self._n_questions = questions
        self._split_share = split_punctuation_newline
        self._sources = present
        self._restored: Mapping[str, Any] | None = None
        self._corpus: Corpus | None = None
        self.domains = list(present)
        self.tokenizer: ByteLevelBPE
        self._train: dict[str, DomainTokens]

    def prepare_data(self) -> None:
        """Build whatever is not in the cache yet: texts, tokenizer, token ids."""
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        """Load everything from the cache, building what is missing; a second call does nothing."""
        if self._corpus is not None:
            return
        corpus = read_corpus(
            sources=self._sources, held_out_fraction=self._held_out_fraction, cache_dir=self._cache_dir
        )
        texts = {name: rows["text"] for name, rows in corpus.train.items()}
        self.tokenizer = self._tokenizer_factory(texts=texts, cache_dir=str(self._cache_dir))
        self._train = tokenise(corpus=corpus, tokenizer=self.tokenizer, cache_dir=self._cache_dir)
        self._corpus = corpus

    @property
    def corpus(self) -> Corpus:
        """Training and held-out texts of each domain."""
        self.setup()
        assert self._corpus is not None
        return self._corpus

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
                "the data state was saved with other texts, tokenizer, seed, weights, sequence_length, shuffle_window, "
                "fim or split_punctuation_newline than the configuration has now"
            )
        self._restored = state

    def steps(self) -> Iterator[Step]:
        rows, key = iter(self._rows()), self.stream_key()
        tokens = 0
        if self._restored is not None:
            rows.set_state(self._restored["rows"])
            tokens = self._restored["tokens"]
        while tokens < self._total_tokens:
            packs = [next(rows) for _ in range(self.rows_per_step(tokens))]
            before, tokens = tokens, tokens + len(packs) * self._sequence_length
            state = {"stream": key, "tokens": tokens, "rows": rows.get_state()}
            yield Step([self._batch(part) for part in self._parts(packs)], before, state)

    def rows_per_step(self, tokens: int) -> int:
        """Rows of the step that begins after `tokens`: the schedule's value, rounded."""
        return max(1, round(self._global_batch_size(tokens)))

    def stream_key(self) -> str:
        """Equal for configurations that give the same endless stream of rows."""
        weights = [(name, source.weight) for name, source in self._sources.items()]
        settings = [
            self._seed,
            weights,
            self._sequence_length,
            self._shuffle_window,
            list(self._fim),
            self._split_share,
        ]
        return digest([self.corpus.key, self.tokenizer.identity(), settings])

    def validation_batches(self) -> Iterator[MicroBatch]:
        """The first held-out texts of each domain, without fill-in-the-middle; a domain has rows of its own."""
        rows = {
            i: validation_rows(texts, tokenizer=self.tokenizer, length=self._sequence_length)
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
        corpus = self.corpus
        return questions(
            list(corpus.held_out.values()),
            list(corpus.train.values()),
            count=self._n_questions,
            tokenizer=self.tokenizer,
        )

    def held_out_documents(self, domain: str) -> list[str]:
        """All held-out texts of a domain, those of the validation set first."""
        return list(self.corpus.held_out[domain]["text"])

    def samples(self) -> list[Sample]:
        """One line of the first held-out text of the first domain, to be written after what comes before it, and with
        what comes after it too."""
        excerpt = self._sequence_length * CHARACTERS_PER_TOKEN // 2  # fits in a row with room for the middle
        prefix, suffix, real = three_parts(self.held_out_documents(self.domains[0])[0], longest=excerpt)
        return [Sample("completion", prefix, None, real), Sample("infilling", prefix, suffix, real)]

    def _validation_texts(self) -> dict[str, Any]:
        return {
            name: validation_texts(rows["text"], validation_tokens=self._validation_tokens)
            for name, rows in self.corpus.held_out.items()
        }

    def _rows(self) -> Any:
        self.setup()
        rendering = Rendering(
            tokenizer=self.tokenizer,
            seed=self._seed,
            fim=self._fim,
            split_punctuation_newline=self._split_share,
        )
        return training_rows(
            domains=self._train,
            weights={name: source.weight for name, source in self._sources.items()},
            rendering=rendering,
            sequence_length=self._sequence_length,
            shuffle_window=self._shuffle_window,
            seed=self._seed,
        )

    def _parts(self, packs: list[Pack]) -> list[list[Pack]]:
        size = self._micro_batch_size
        return [packs[start : start + size] for start in range(0, len(packs), size)]

    def _batch(self, packs: list[Pack]) -> MicroBatch:
        """Rows as a micro-batch; if they are too few for one, rows of padding follow, so that all have one shape."""
        blank = Pack(np.full(self._sequence_length + 1, self.tokenizer.pad), domain=0)
        packs = packs + [blank] * (self._micro_batch_size - len(packs))
        tokens = np.stack([pack.tokens for pack in packs])
        domains = np.broadcast_to(np.array([[pack.domain] for pack in packs]), tokens.shape)
        return micro_batch(tokens, domains, tokenizer=self.tokenizer, isolate=self._isolate, bos_is_target=True)


class Steps:
    """The training steps; each iteration begins where the datamodule stands."""

    def __init__(self, data: DataModule) -> None:
        self._data = data

    def __iter__(self) -> Iterator[Step]:
        return self._data.steps()
