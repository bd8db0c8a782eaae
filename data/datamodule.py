"""The datamodule: one Lightning batch is one optimiser step, and carries the data state after it."""

import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np

from data.batches import micro_batch
from data.cache import rebuilt
from data.documents import HeldOut
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
from data.layout import Packing, Row, Rows
from data.older_split import older_held_out
from data.preparation import Prepared, TokenizerFactory, corpus_key, prepare, settings
from data.sources import Source
from data.stepping import StepModule
from data.survey import read_survey
from dsv3.bounds import ArgumentsOf, Fraction, NonNegativeInt, PositiveInt, Seed
from dsv3.contracts import MicroBatch, Question, Sample, Schedule, Tokenizer

CORPUS = "corpus.txt"
"""Beside held-out texts: the key of the corpus that they were held out from."""

OLDER = "windows"
"""`packing` of runs of an older version, whose rows were shuffled within windows: no option, but read."""


class DataModule(StepModule):
    """Texts of several domains as `Step`s of packed rows; satisfies `dsv3.contracts.Data`."""

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
        super().__init__(
            micro_batch_size=micro_batch_size, global_batch_size=global_batch_size, total_tokens=total_tokens
        )
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
        if validation_tokens < 1:
            raise ValueError(f"data.validation_tokens={validation_tokens}: must be at least 1")
        self._tokenizer_factory = tokenizer
        self._isolate = isolate_documents
        self._validation_tokens = validation_tokens
        self._n_questions = questions
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
        with rebuilt(folder) as building:
            for file in sorted(kept.folder.iterdir()):
                if file.name in ("survey.json", "contents.npy") or file.name.endswith(".held_out.parquet"):
                    try:
                        os.link(file, building / file.name)
                    except OSError:
                        shutil.copyfile(file, building / file.name)
            (building / CORPUS).write_text(kept.key + "\n")

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
        super().restore(state)

    def stream_key(self) -> str:
        """Equal for configurations that give the same endless stream of rows."""
        return self.prepared.stream_key()

    def rows(self) -> Rows:
        return self.prepared.rows()

    @property
    def prepared(self) -> Prepared:
        """What lies on disk for this run."""
        self.setup()
        if self._prepared is None:
            raise ValueError("data.packing=windows: the rows of an older run can be scored, and not trained on")
        return self._prepared

    def validation_batches(self) -> Iterator[MicroBatch]:
        """The first held-out texts of each domain, without fill-in-the-middle; a domain has rows of its own."""
        rows = {
            i: validation_rows(texts, tokenizer=self.tokenizer, length=self.settings.sequence_length)
            for i, texts in enumerate(self._validation_texts().values())
        }
        return validation_batches(
            rows, tokenizer=self.tokenizer, micro_batch_size=self.micro_batch_size, isolate=self._isolate
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

    def batch(self, rows: list[Row]) -> MicroBatch:
        """Rows as a micro-batch; if they are too few for one, rows of padding follow, so that all have one shape."""
        blank = Row(np.full(self.settings.sequence_length + 1, self.tokenizer.pad), domain=0)
        rows = rows + [blank] * (self.micro_batch_size - len(rows))
        tokens = np.stack([row.tokens for row in rows])
        domains = np.broadcast_to(np.array([[row.domain] for row in rows]), tokens.shape)
        return micro_batch(tokens, domains, tokenizer=self.tokenizer, isolate=self._isolate, bos_is_target=True)
