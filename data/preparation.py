"""Preparation: everything on disk that training reads, made where it is not there yet.

    survey   (corpus, share held out)          what is held out, and a sample of the rest       data/survey.py
    store    (survey, tokenizer)               token ids of the training documents              data/store.py
    edition  (store, FIM, splits, epoch)       documents that an epoch renders otherwise        data/edition.py
    layout   (edition, seed, row length)       the order of an epoch's documents                data/layout.py

Each lies in a folder of `cache_dir` that is named by the hash of what it follows from. Imports no torch.
"""

import contextlib
import ctypes
import errno
import functools
import gc
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import pyarrow
from filelock import FileLock, Timeout

from data.cache import cached, digest
from data.documents import PIECE
from data.edition import DomainEdition, read_edition, rendering, write_edition
from data.fim import FillInTheMiddle
from data.layout import DomainRows, Epoch, Packing, Rows, mixture, read_layout, write_layout
from data.processes import Processes
from data.progress import Progress
from data.sources import Source
from data.store import Store, id_type, read_store, write_index, write_shards
from data.survey import Survey, of_source, read_survey, survey

if TYPE_CHECKING:
    from dsv3.contracts import Tokenizer

log = logging.getLogger(__name__)

VERSION = 1
"""Raised with every change of the code that changes what is kept for the same texts and settings."""


SMALL_CORPUS = 4_000_000
"""Bytes of text that are tokenised in this process: starting others takes as long."""


TRIMMED_EVERY = 10_000_000
"""Characters after which memory that tokenising has freed goes back to the system, so that it does not add up."""

CHANGED = "the texts of data.sources changed while they were read; start again"


class TokenizerFactory(Protocol):
    """What conf/tokenizer/*.yaml gives: training texts of each domain -> tokenizer."""

    def __call__(self, *, texts: Mapping[str, Any], cache_dir: str) -> "Tokenizer": ...


class Settings(NamedTuple):
    """The keys of `data` that decide what lies on disk; conf/data/default.yaml says what each means."""

    sources: dict[str, Source]
    cache_dir: Path
    seed: int
    sequence_length: int
    total_tokens: int
    packing: Packing
    held_out_fraction: float
    held_out_bytes: int
    max_document_bytes: int
    fim: FillInTheMiddle
    split_punctuation_newline: float
    processes: int


def settings(
    *,
    sources: Mapping[str, Source | None],
    cache_dir: str | Path,
    fim: Mapping[str, Any],
    processes: int | None,
    **others: Any,
) -> Settings:
    """`Settings` from values as the configuration has them.

    Raises:
        ValueError: a value is out of its range; the message names its key.
    """
    present = {name: source for name, source in sources.items() if source is not None}
    if not present:
        raise ValueError("data.sources: must have at least one source; data=files reads data.sources.text.path=FOLDER")
    count = processes or len(os.sched_getaffinity(0))
    made = Settings(sources=present, cache_dir=Path(cache_dir), fim=FillInTheMiddle(**fim), processes=count, **others)
    made.fim.check()
    for key in ("sequence_length", "total_tokens", "held_out_bytes", "max_document_bytes", "processes"):
        if getattr(made, key) < 1:
            raise ValueError(f"data.{key}={getattr(made, key)}: must be at least 1")
    if not 0 < made.held_out_fraction < 1:
        raise ValueError(f"data.held_out_fraction={made.held_out_fraction}: must be between 0 and 1")
    if not 0 <= made.split_punctuation_newline <= 1:
        share = made.split_punctuation_newline
        raise ValueError(f"data.split_punctuation_newline={share}: must be between 0 and 1")
    mixture({name: source.weight for name, source in present.items()})
    return made


class Prepared(NamedTuple):
    """A corpus ready to train on."""

    settings: Settings
    survey: Survey
    store: Store
    tokenizer: "Tokenizer"

    def rows(self) -> Rows:
        """The rows of the run by number; the layout of an epoch is made when its first row is asked for."""
        domains = [
            DomainRows(
                name,
                seed=self.settings.seed,
                length=self.settings.sequence_length + 1,
                pad=self.tokenizer.pad,
                epoch=functools.partial(self.epoch, name),
            )
            for name in self.settings.sources
        ]
        return Rows(domains, mixture({name: source.weight for name, source in self.settings.sources.items()}))

    def rows_needed(self) -> int:
        """About the rows that the token budget takes; where documents stay whole, padding takes more."""
        return -(-self.settings.total_tokens // self.settings.sequence_length)

    def stream_key(self) -> str:
        """Equal for configurations that give the same endless stream of rows."""
        settings = self.settings
        weights = [(name, source.weight) for name, source in settings.sources.items()]
        return digest([self.edition_key(), weights, settings.seed, settings.sequence_length, settings.packing])

    def edition_key(self) -> str:
        settings = self.settings
        return digest(
            [self.store.key, list(settings.fim) if settings.fim.rate else None, settings.split_punctuation_newline]
        )

    def edition_folder(self, domain: str, epoch: int) -> Path:
        return self.settings.cache_dir / "editions" / self.edition_key() / domain / f"{epoch:04}"

    def edition(
        self, domain: str, epoch: int, *, processes: Processes, progress: Callable[[int], None] = lambda tokens: None
    ) -> DomainEdition | None:
        """An epoch's rendered documents of a domain, made if they are not there yet; None if nothing is rendered."""
        folder = self.edition_folder(domain, epoch)
        task = rendering(
            tokenizer=self.tokenizer,
            fim=self.settings.fim,
            split_share=self.settings.split_punctuation_newline,
            store=self.store,
            domain=domain,
            epoch=epoch,
            folder=folder,
        )
        if task.changes_nothing:
            return None
        if not (folder / "edition.json").exists():
            with locked(folder):
                if not (folder / "edition.json").exists():
                    write_edition(task, processes=processes, progress=progress)
        return read_edition(folder)

    def epoch(self, domain: str, epoch: int) -> Epoch:
        """The layout of an epoch of a domain, made if it is not there yet."""
        settings = self.settings
        with Processes(1) as processes:
            edition = self.edition(domain, epoch, processes=processes)
        tokens = self.store.tokens(domain)
        length = settings.sequence_length + 1
        key = digest([self.edition_key(), settings.seed, settings.packing, length * (settings.packing == "whole")])

        def build(folder: Path) -> None:
            write_layout(
                folder,
                tokens=tokens,
                edition=edition,
                seed=settings.seed,
                domain=domain,
                epoch=epoch,
                packing=settings.packing,
                length=length,
            )

        folder = cached(settings.cache_dir / "layouts" / key / domain, f"{epoch:04}", None, build)
        return read_layout(folder, tokens=tokens, edition=edition)


def read_corpus(settings: Settings) -> Survey:
    """What the first reading of the sources finds; from the cache, if they have not changed.

    Raises:
        ValueError: a source is at fault (its key is named), or leaves a domain without training or held-out texts.
    """
    for name in settings.sources:
        if not re.fullmatch(r"\w+", name):
            raise ValueError(f"data.sources.{name}: a domain's name is made of letters, digits and underscores")
    key = corpus_key(settings)
    folder = settings.cache_dir / "corpora"

    def build(building: Path) -> None:
        sizes = [source.size() if source.size else None for source in settings.sources.values()]
        total = None if None in sizes else sum(size for size in sizes if size is not None)
        with Progress("reading", total, unit="B") as progress:
            survey(
                settings.sources,
                building,
                share=settings.held_out_fraction,
                held_out_bytes=settings.held_out_bytes,
                longest=settings.max_document_bytes,
                progress=progress.add,
            )
        if corpus_key(settings) != key:
            raise ValueError(CHANGED)

    with room(settings.cache_dir):
        return read_survey(cached(folder, key, "the texts of " + ", ".join(settings.sources), build))


def corpus_key(settings: Settings) -> str:
    """Equal for equal texts in an equal split; found without reading the texts."""
    identities = {}
    for name, source in settings.sources.items():
        with of_source(name):
            identities[name] = source.identity()
    limits = [settings.held_out_fraction, settings.held_out_bytes, settings.max_document_bytes]
    return digest([VERSION, limits, identities])


def prepare(settings: Settings, tokenizer_factory: TokenizerFactory) -> Prepared:
    """Make all that the run reads, or find it in the cache.

    Raises:
        ValueError: a source or a setting is at fault; its key is named.
        OSError: the disk is full, or cannot be written. What is finished stays, and the next call goes on from it.
    """
    found = read_corpus(settings)
    texts = {name: _Sample(found, name) for name in settings.sources}
    tokenizer = tokenizer_factory(texts=texts, cache_dir=str(settings.cache_dir))
    key = digest([VERSION, found.key, tokenizer.identity()])
    folder = settings.cache_dir / "stores" / key
    few = sum(domain.bytes for domain in found.domains.values()) < SMALL_CORPUS
    with room(settings.cache_dir), Processes(1 if few else settings.processes) as processes:
        if not (folder / "index.json").exists():
            with locked(folder):
                if not (folder / "index.json").exists():
                    _tell_disk_use(settings, found, tokenizer, folder)
                    _give_memory_back()
                    _write_store(folder, settings, found, tokenizer, processes)
        prepared = Prepared(settings, found, read_store(folder), tokenizer)
        if settings.fim.rate:
            _refuse_changed(prepared)
        _write_editions(prepared, processes)
    return prepared


def _write_store(folder: Path, settings: Settings, found: Survey, tokenizer: "Tokenizer", processes: Processes) -> None:
    total = sum(domain.bytes - domain.held_out_bytes for domain in found.domains.values())
    freed = 0
    with Progress("tokenising", total, unit="B") as progress:

        def add(name: str, characters: int) -> None:
            nonlocal freed
            progress.add(name, characters)
            freed += characters
            if freed > TRIMMED_EVERY:
                _trim()
                freed = 0

        write_shards(
            folder,
            survey=found,
            sources=settings.sources,
            tokenizer=tokenizer,
            longest=settings.max_document_bytes,
            processes=processes,
            progress=add,
        )
    if corpus_key(settings) != found.key:
        shutil.rmtree(folder)
        raise ValueError(CHANGED)
    write_index(folder, survey=found, names=list(settings.sources), dtype=id_type(tokenizer))


def _write_editions(prepared: Prepared, processes: Processes) -> None:
    """The editions of all epochs that the token budget reaches."""
    needed = prepared.rows().given(prepared.rows_needed())
    length = prepared.settings.sequence_length
    for name, rows in zip(prepared.settings.sources, needed):
        epochs = -(-rows * length // prepared.store.domains[name].tokens)
        missing = [e for e in range(epochs) if not (prepared.edition_folder(name, e) / "edition.json").exists()]
        total = len(missing) * prepared.store.domains[name].tokens * prepared.settings.fim.rate
        with Progress(f"rendering {name}", int(total), unit="tokens") as progress:
            for epoch in missing:
                prepared.edition(name, epoch, processes=processes, progress=functools.partial(progress.add, name))


def _refuse_changed(prepared: Prepared) -> None:
    for name, domain in prepared.store.domains.items():
        if domain.changed:
            raise ValueError(
                f"data.fim.rate={prepared.settings.fim.rate}: the tokenizer does not give back the text of "
                f"{domain.changed!r} in data.sources.{name}, and fill-in-the-middle cuts the text that it gives back: "
                "choose another tokenizer, or data.fim.rate=0"
            )


def _tell_disk_use(settings: Settings, found: Survey, tokenizer: "Tokenizer", folder: Path) -> None:
    """Say how much will be written, by the bytes per token of a sample; refuse what does not fit."""
    width = 2 if id_type(tokenizer) == "uint16" else 4
    needed = 0
    for name, domain in found.domains.items():
        sample = "".join(found.sample(name))[:PIECE]
        share = len(tokenizer.encode(sample)) / max(1, len(sample.encode()))
        tokens = domain.bytes * share + 2 * domain.documents
        needed += int(tokens * width * (1 + settings.fim.rate) + 48 * domain.documents)
    there = sum(file.stat().st_size for file in folder.rglob("*.ids"))
    free = shutil.disk_usage(settings.cache_dir).free
    total = sum(domain.bytes for domain in found.domains.values())
    log.info("%s of text, about %s of token ids in %s (%s free)", size(total), size(needed), folder, size(free))
    if needed - there > free:
        place = settings.cache_dir
        raise OSError(f"data.cache_dir={place}: about {size(needed)} are needed, and {size(free)} are free")


def size(count: float) -> str:
    """A number of bytes in words."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            break
        count /= 1000
        if unit == "GB":
            unit = "TB"
    return f"{count:.3g} {unit}"


def _give_memory_back() -> None:
    """Return what reading and training a tokenizer took to the system: what follows takes much less."""
    gc.collect()
    pyarrow.default_memory_pool().release_unused()
    _trim()


def _trim() -> None:
    """Return freed memory to the system, of which each thread that waits for a process keeps some."""
    with contextlib.suppress(AttributeError, OSError):  # other C libraries than glibc
        ctypes.CDLL(None).malloc_trim(0)


class _Sample:
    """Training texts of a domain, read when they are asked for."""

    def __init__(self, found: Survey, domain: str) -> None:
        self._found, self._domain = found, domain

    def __iter__(self) -> Iterator[str]:
        return iter(self._found.sample(self._domain))


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Have a folder to oneself: of processes that want to make the same, one does and the others wait."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        log.info("waiting for another process that prepares %s", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def room(cache_dir: Path) -> Iterator[None]:
    """Say what to do where the disk is full."""
    cache_dir.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"{os.strerror(error.errno)} (data.cache_dir={cache_dir}); what is finished is kept, and the same command "
            "goes on from it once there is room",
        ) from error
