"""The store: ids of documents, near-duplicates, and what interruptions and full disks leave behind."""

import errno
import io
import itertools
import operator
import os
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data import preparation, shards
from data import store as module
from data.documents import pieces
from data.preparation import Settings, prepare, settings
from data.processes import Processes, serve
from data.sources import Source
from data.store import DomainCounts, read_store
from data.tokenizer import ByteLevelBPE
from tests.data.conftest import Make, in_memory, training_texts, words

FIM = {"rate": 0.0, "order": "psm", "max_characters": None}


@pytest.fixture
def made(tokenizer: ByteLevelBPE, tmp_path: Path) -> Callable[..., Any]:
    """made(sources, **changes): the corpus of these sources, prepared in a folder of its own."""

    def build(sources: dict[str, Source], **changes: Any) -> Any:
        values: dict[str, Any] = {
            "seed": 1,
            "cache_dir": tmp_path / "cache",
            "sequence_length": 64,
            "total_tokens": 64,
            "packing": "cut",
            "held_out_fraction": 0.1,
            "held_out_bytes": 10**6,
            "max_document_bytes": 10**7,
            "fim": FIM,
            "split_punctuation_newline": 0.0,
            "processes": 1,
        }
        found: Settings = settings(sources=sources, **(values | changes))
        return prepare(found, lambda **_: tokenizer)

    return build


def decided(texts: list[str], held_out: list[str]) -> Source:
    """A source that holds out some of its texts itself."""
    return in_memory([*texts, *held_out], held_out=[False] * len(texts) + [True] * len(held_out))


def counts(corpus: Any, domain: str = "a") -> DomainCounts:
    return corpus.store.domains[domain]


def test_freed_memory_is_given_back_while_it_tokenises(
    made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What threads keep of it would add up: 100 MB in a minute."""
    given_back: list[int] = []
    written: list[int] = []
    monkeypatch.setattr(preparation, "TRIMMED_EVERY", 10_000)
    monkeypatch.setattr(preparation, "_trim", lambda: given_back.append(sum(written)))
    monkeypatch.setattr(preparation.Progress, "add", lambda self, name, count: written.append(count))
    monkeypatch.setattr(module, "TEXTS", 5)
    made({"a": in_memory([words(seed=i, count=200) for i in range(120)])})
    between = np.diff([at for at in given_back if at])
    assert len(between) > 5
    assert between.max() < 20_000


def test_ordinary_documents_run_from_bos_to_eos(make: Make) -> None:
    data = make()
    tokens = data.prepared.store.tokens("middle")
    tokenizer = data.tokenizer
    for start, length, text in zip(tokens.starts, tokens.lengths, training_texts(data, "middle"), strict=True):
        ids = tokens.shards[0][start : start + length].tolist()
        assert ids == [tokenizer.bos, *tokenizer.encode(text), tokenizer.eos]


def test_every_training_text_is_there_once_in_order(make: Make, tmp_path: Path) -> None:
    texts = [f"text number {i} 日本語 " * (1 + i % 7) for i in range(200)]
    data = make(sources={"a": in_memory(texts)}, cache_dir=tmp_path)
    held_out = set(data.held_out_documents("a"))
    assert training_texts(data, "a") == [text for text in texts if text not in held_out]


def test_a_long_document_is_tokenised_in_pieces(
    made: Callable[..., Any], tokenizer: ByteLevelBPE, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also however long its lines are."""
    monkeypatch.setattr("data.documents.PIECE", 1000)
    text = words(seed=1, count=2000) + "1\n2 " * 1000
    ids = [index for piece in pieces(text) for index in tokenizer.encode(piece)]
    assert len(list(pieces(text))) > 10
    tokens = made({"a": decided([text], ["held out"])}).store.tokens("a")
    assert tokens.shards[0].tolist() == [tokenizer.bos, *ids, tokenizer.eos]


def test_a_training_text_that_is_held_out_too_is_dropped(made: Callable[..., Any]) -> None:
    """Also a short one without a telling line, and one of another domain."""
    corpus = made({"a": decided(["other", "a"], ["a", "b"]), "b": decided(["b", "yet another"], ["c"])})
    assert (counts(corpus).documents, counts(corpus).copies) == (1, 1)
    assert (counts(corpus, "b").documents, counts(corpus, "b").copies) == (1, 1)


def telling(*numbers: int) -> str:
    return "\n".join(f"a telling line, number {number}" for number in numbers)


def test_half_of_a_held_out_documents_lines_makes_a_near_duplicate(made: Callable[..., Any]) -> None:
    held_out = telling(*range(10))
    half, less = telling(*range(5), *range(100, 130)), telling(*range(4), *range(200, 230))
    corpus = made({"a": decided([half, less], [held_out])})
    assert (counts(corpus).documents, counts(corpus).near_duplicates) == (1, 1)
    corpus = made({"a": decided([less], [telling(50)]), "b": decided([half, "other"], [held_out])})
    assert (counts(corpus).near_duplicates, counts(corpus, "b").near_duplicates) == (0, 1)


def test_lines_of_more_than_twenty_training_documents_do_not_tell(made: Callable[..., Any]) -> None:
    common = telling(*range(10))
    for copies, dropped in ((20, 20), (21, 0)):
        texts = [f"{common}\n{telling(1000 + i)}" for i in range(copies)]
        corpus = made({"a": decided([*texts, "other"], [f"{common}\n{telling(50, 51, 52)}"])})
        assert counts(corpus).near_duplicates == dropped
    texts = [f"{common}\n{telling(1000 + i)}" for i in range(21)]
    corpus = made({"a": decided([*texts, telling(50, 51)], [f"{common}\n{telling(50, 51, 52)}"])})
    assert counts(corpus).near_duplicates == 1, "two of the three lines that still tell"


@pytest.mark.parametrize("seed", range(10))
def test_no_training_text_has_half_of_a_held_out_ones_telling_lines(made: Callable[..., Any], seed: int) -> None:
    """Against a count of all lines, on families of texts that share many."""
    source = random.Random(seed)
    pool = [f"a telling line number {i}" for i in range(60)]
    texts = ["\n".join(source.sample(pool, source.randint(3, 15))) for _ in range(40)]
    held_out = ["\n".join(source.sample(pool, source.randint(3, 15))) for _ in range(5)]
    holders = {line: sum(line in text.split("\n") for text in texts) for line in pool}
    dropped = 0
    for text in texts:
        own = set(text.split("\n"))
        for other in held_out:
            tell = {line for line in other.split("\n") if holders[line] <= 20}
            if tell and 2 * len(own & tell) >= len(tell):
                dropped += 1
                break
    assert counts(made({"a": decided([*texts, "other"], held_out)})).near_duplicates == dropped > 0


def test_a_domain_that_only_repeats_held_out_text_is_named(made: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"data\.sources\.a: all training documents nearly repeat"):
        made({"a": decided([telling(1, 2, 3)], [telling(1, 2, 4)])})


def test_one_document_keeps_its_beginning_though_its_lines_repeat(made: Callable[..., Any]) -> None:
    corpus = made({"a": in_memory(["a line of a log file\n" * 500])})
    assert counts(corpus).documents == 1
    assert corpus.survey.domains["a"].split_at < 500 * 21


class Lossy(ByteLevelBPE):
    """Forgets capital letters."""

    def encode_batch(self, texts: Any) -> list[list[int]]:
        return super().encode_batch([text.lower() for text in texts])

    def identity(self) -> str:
        return "lossy"


def test_a_tokenizer_that_does_not_give_the_text_back_is_refused_with_fim(
    tokenizer: ByteLevelBPE, tmp_path: Path, make: Make
) -> None:
    lossy = Lossy(content=tokenizer._content)
    sources = {"a": in_memory([*(f"text {i}" for i in range(20)), "Upper"], label="n")}
    made = {"tokenizer": lambda **_: lossy, "sources": sources, "cache_dir": tmp_path}
    make(**made, fim=FIM, split_punctuation_newline=0.0).setup()
    with pytest.raises(
        ValueError, match=r"data\.fim\.rate=0\.5: .*does not give back the text of 'n20' in data\.sources\.a"
    ):
        make(**made, fim=FIM | {"rate": 0.5}).setup()


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "SHARD", 3000)
    monkeypatch.setattr(module, "TEXTS", 5)


def test_killed_anywhere_the_shards_are_the_same_in_the_end(
    made: Callable[..., Any], tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {
        "a": in_memory([words(seed=i, count=60) for i in range(150)]),
        "b": in_memory([words(seed=1000 + i, count=30) for i in range(40)]),
    }
    whole = made(sources, cache_dir=tmp_path / "whole").store
    assert whole.domains["a"].shards > 5
    killed = 0
    encode = module.encode

    def dying(settings: Any, batch: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise KeyboardInterrupt
        return encode(settings, batch)

    monkeypatch.setattr(module, "encode", dying)
    source = random.Random(1)
    for _ in range(100):
        left = source.randint(1, 12)
        try:
            store = made(sources, cache_dir=tmp_path / "killed").store
            break
        except KeyboardInterrupt:
            killed += 1
    assert killed > 4
    assert files_of(store.folder) == files_of(whole.folder)


def test_two_processes_write_the_same_shards_as_one(
    made: Callable[..., Any], tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data.preparation.SMALL_CORPUS", 0)
    sources = {"a": in_memory([words(seed=i, count=100) for i in range(150)])}
    one, two = (made(sources, cache_dir=tmp_path / str(count), processes=count).store for count in (1, 2))
    assert one.domains["a"].shards > 5
    assert files_of(one.folder) == files_of(two.folder)


def test_a_process_that_is_killed_is_told() -> None:
    with Processes(2) as pool:
        found = pool.map(exec, "import os; os.kill(os.getpid(), 9)", [{}, {}])
        with pytest.raises(RuntimeError, match=r"ended by signal 9 \(out of memory\?\).*data\.processes=1"):
            list(found)


def test_a_process_that_is_killed_is_told_also_while_more_is_sent_to_it() -> None:
    tasks = [{"text": "x" * 1_000_000} for _ in range(6)]
    with pytest.raises(RuntimeError, match="ended by signal 9"), Processes(2) as pool:
        list(pool.map(exec, "import os; os.kill(os.getpid(), 9)", tasks))


def test_an_error_that_cannot_be_made_again_is_told_by_its_name() -> None:
    requests = io.BytesIO(pickle.dumps(pickle.dumps((raise_peculiar, 1))) + pickle.dumps(2))
    answers = io.BytesIO()
    serve(requests, answers)
    kind, error = pickle.loads(answers.getvalue())
    assert kind == "error"
    assert repr(error) == "RuntimeError(\"PeculiarError('1 and 2')\")"


class PeculiarError(Exception):
    """Takes other arguments than it keeps."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


def raise_peculiar(shared: int, task: int) -> None:
    raise PeculiarError(shared, task)


def test_what_goes_wrong_in_a_process_is_raised_here() -> None:
    with pytest.raises(ZeroDivisionError), Processes(2) as pool:
        list(pool.map(operator.floordiv, 1, [1, 0]))
    with Processes(2) as pool:
        assert list(pool.map(operator.floordiv, 12, [1, 2, 3, 4] * 5)) == [12, 6, 4, 3] * 5


def test_a_full_disk_is_told_and_loses_nothing(
    made: Callable[..., Any], tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {"a": in_memory([words(seed=i, count=60) for i in range(150)])}
    whole = made(sources, cache_dir=tmp_path / "whole").store
    add, room = shards.Shard.add, 12

    def full(self: Any, *arguments: Any) -> None:
        nonlocal room
        room -= 1
        if room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(self, *arguments)

    monkeypatch.setattr(shards.Shard, "add", full)
    with pytest.raises(OSError, match=r"No space left on device \(data\.cache_dir=.*what is finished is kept"):
        made(sources, cache_dir=tmp_path / "full")
    (folder,) = (tmp_path / "full" / "stores").glob("[0-9a-f]*")
    assert sorted(folder.rglob("*.npz"))
    room = 10**6
    assert made(sources, cache_dir=tmp_path / "full").store.folder == folder
    assert files_of(folder) == files_of(whole.folder)


def test_more_than_there_is_room_for_is_refused_before_it_starts(
    made: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(OSError, match=r"data\.cache_dir=.*cache: about .* kB are needed, and 1 kB are free"):
        made({"a": in_memory([words(seed=i, count=200) for i in range(20)])})
    assert not list((tmp_path / "cache").rglob("*.ids"))


def test_a_corpus_that_changes_while_it_is_read_is_refused(made: Callable[..., Any]) -> None:
    texts = [f"text {i}" for i in range(20)]
    source = in_memory(texts)
    calls = iter(range(100))
    changing = Source(weight=1.0, identity=lambda: {"call": next(calls)}, documents=source.documents)
    with pytest.raises(ValueError, match="changed while they were read"):
        made({"a": changing})


def test_a_corpus_that_changes_while_it_is_tokenised_leaves_no_store(made: Callable[..., Any], tmp_path: Path) -> None:
    source, version = in_memory([f"text {i}" for i in range(20)]), [1]
    readings = itertools.count()

    def documents() -> Any:
        if next(readings) == 1:  # the survey's was the first
            version[0] = 2
        return source.documents()

    changing = Source(weight=1.0, identity=lambda: {"version": version[0]}, documents=documents, size=source.size)
    with pytest.raises(ValueError, match="changed while they were read"):
        made({"a": changing})
    assert not list((tmp_path / "cache" / "stores").glob("[0-9a-f]*"))


def test_what_is_written_already_needs_no_room(
    made: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = {"a": in_memory([words(seed=i, count=200) for i in range(40)])}
    (made(sources).store.folder / "index.json").unlink()
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10_000}))
    assert made(sources).store.domains["a"].documents > 0


def test_a_store_is_read_as_it_was_written(made: Callable[..., Any]) -> None:
    store = made({"a": in_memory([words(seed=i, count=50) for i in range(50)])}).store
    again = read_store(store.folder)
    assert again == store
    tokens = again.tokens("a")
    assert again.domains["a"].tokens == int(np.sum(tokens.lengths))
    assert again.domains["a"].documents == len(tokens.starts)
