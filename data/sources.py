"""Sources of text. A source gives a Hugging Face `Dataset` with the columns `name` and `text`.

Optional columns more: `group` (documents of one group are held out together), `held_out` (bool: the source itself says
which documents are kept from training), and `family`, `question`, `answer` of documents that ask a question with one
right answer. A new source is a function that
returns a `Source`, named by `_target_` in conf/data/*.yaml.
"""

import dataclasses
import enum
import importlib.metadata
import json
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow.parquet
from datasets import Dataset

from data.cache import digest

CODE = digest(Path(__file__).read_text(encoding="utf-8"))
"""Changes with this file, so that what an older version of it read is not taken for what it reads now."""

HELD_OUT_SEEDS = 1_000_000_000
"""Offset of the seeds of held-out questions; training uses the seeds below it."""


class Source:
    """The texts of one domain, and their share of the training tokens."""

    def __init__(
        self, *, weight: float, identity: Callable[[], Mapping[str, Any]], load: Callable[[], Dataset]
    ) -> None:
        """`weight`: above 0, relative to the other sources'.

        `identity`: JSON-serialisable, quick to find, equal only where `load` gives the same texts.
        """
        if weight <= 0:
            raise ValueError(f"weight={weight} is not above 0 (leave the source out instead)")
        self.weight = weight
        self.identity = identity
        self.load = load


def standard_library(*, weight: float) -> Source:
    """The Python files of the interpreter's own standard library, without tests and without pydoc's topics."""
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "ensurepip", "pydoc_data"}

    def files() -> list[Path]:
        found = (path.relative_to(root) for path in root.rglob("*.py"))
        return sorted(path for path in found if left_out.isdisjoint(path.parts))

    def identity() -> Mapping[str, Any]:
        return {"code": CODE, "files": [(path.as_posix(), (root / path).stat().st_size) for path in files()]}

    def load() -> Dataset:
        texts = {path.as_posix(): _read_or_none(root / path) for path in files()}
        return _dataset({"name": name, "text": text} for name, text in texts.items() if text)

    return Source(weight=weight, identity=identity, load=load)


def local_files(*, path: str, text_column: str, weight: float) -> Source:
    """Any text, .jsonl or .parquet file, or a folder of such files.

    A text file is a document; a .jsonl or .parquet file has one in each row, in the column `text_column`.

    Raises:
        ValueError: the path is missing or empty, a file is not UTF-8, or a file lacks the column.
    """
    root = Path(path).expanduser()

    def files() -> list[Path]:
        if not root.exists():
            raise ValueError(f"path={path!r} does not exist (python -m data.fetch makes what is in .cache/corpus)")
        found = sorted(file for file in root.rglob("*") if file.is_file()) if root.is_dir() else [root]
        found = [file for file in found if not any(part.startswith(".") for part in file.relative_to(root).parts)]
        if not found:
            raise ValueError(f"path={path!r} holds no files")
        return found

    def identity() -> Mapping[str, Any]:
        stats = [(file, file.stat()) for file in files()]
        return {"column": text_column, "files": [(str(file), stat.st_size, stat.st_mtime_ns) for file, stat in stats]}

    def load() -> Dataset:
        return _dataset(document for file in files() for document in _documents(file, root, text_column))

    return Source(weight=weight, identity=identity, load=load)


def hub(
    *,
    name: str,
    config: str | None,
    revision: str | None,
    split: str,
    text_column: str,
    limit: int | None,
    weight: float,
) -> Source:
    """A dataset of the Hugging Face Hub (or a folder in its format): its first `limit` rows (null: all)."""
    arguments = {"name": name, "config": config, "revision": revision, "split": split, "column": text_column}

    def load() -> Dataset:
        rows = datasets.load_dataset(name, config, split=split, revision=revision)
        if text_column not in rows.column_names:
            raise ValueError(f"text_column={text_column!r} is not among the columns of {name}: {rows.column_names}")
        rows = rows.select(range(min(len(rows), limit or len(rows))))
        return _dataset({"name": f"{name}:{i}", "text": text} for i, text in enumerate(rows[text_column]))

    return Source(weight=weight, identity=lambda: {**arguments, "limit": limit}, load=load)


def reasoning(*, families: Mapping[str, Mapping[str, Any]], held_out: int, weight: float) -> Source:
    """Questions of reasoning-gym's generators, written `Question: {question}\\nAnswer: {answer}`.

    `families`: of each, the `generator` (its name in reasoning-gym), the number of questions drawn for `train`, and the
    generator's `settings`. `held_out`: questions held out from each. The two come from different seeds, and a question
    that was drawn for both is taken out of training.

    Raises:
        ValueError: an unknown generator or setting.
    """

    def identity() -> Mapping[str, Any]:
        version = importlib.metadata.version("reasoning-gym")
        return {"code": CODE, "version": version, "families": families, "held_out": held_out}

    def load() -> Dataset:
        return _dataset(row for name in families for row in _questions(name, held_out=held_out, **families[name]))

    return Source(weight=weight, identity=identity, load=load)


def _questions(
    family: str, *, generator: str, settings: Mapping[str, Any], train: int, held_out: int
) -> Iterator[dict[str, Any]]:
    """Distinct questions of one family: the held-out ones, then those of training that are not among them."""
    from reasoning_gym.factory import DATASETS

    if generator not in DATASETS:
        raise ValueError(f"families.{family}.generator={generator!r} is none of reasoning-gym's: {sorted(DATASETS)}")
    make, config = DATASETS[generator]
    seen: set[str] = set()
    for is_held_out, seed, size in ((True, HELD_OUT_SEEDS, held_out), (False, 0, train)):
        try:
            drawn = make(config(seed=seed, size=size, **_typed(config, settings)))
        except (ValueError, AssertionError) as error:
            raise ValueError(f"families.{family}: {error}") from error
        for entry in drawn:
            question = entry["question"].strip()
            if question in seen:
                continue
            seen.add(question)
            yield {
                "name": f"{family}/{question}",
                "text": f"Question: {question}\nAnswer: {entry['answer']}",
                "held_out": is_held_out,
                "family": family,
                "question": question,
                "answer": str(entry["answer"]),
            }


def _typed(config: type, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with strings turned into the enumeration members that the generator's configuration has."""
    defaults = {
        field.name: field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        for field in dataclasses.fields(config)
    }
    unknown = sorted(set(settings) - set(defaults))
    if unknown:
        raise ValueError(f"unknown settings {unknown}; there are {sorted(defaults)}")
    result = dict(settings)
    for name, value in settings.items():
        default = defaults[name]
        if isinstance(default, list) and default and isinstance(default[0], enum.Enum):
            result[name] = [type(default[0])(item) for item in value]
    return result


def _documents(file: Path, root: Path, text_column: str) -> Iterator[dict[str, str]]:
    """The documents of one local file, named by its place under `root`."""
    name = file.relative_to(root).as_posix() if file != root else file.name
    if file.suffix == ".parquet":
        columns = pyarrow.parquet.read_schema(file).names
        if text_column not in columns:
            raise ValueError(f"text_column={text_column!r} is not among the columns of {file}: {columns}")
        texts = pyarrow.parquet.read_table(file, columns=[text_column])[text_column].to_pylist()
        yield from ({"name": f"{name}:{i}", "text": text} for i, text in enumerate(texts))
    elif file.suffix in (".jsonl", ".ndjson"):
        for i, line in enumerate(_read(file).split("\n")):
            if line.strip():
                yield {"name": f"{name}:{i}", "text": _text_of(line, text_column, f"line {i + 1} of {file}")}
    else:
        yield {"name": name, "text": _read(file)}


def _text_of(line: str, text_column: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from error
    if text_column not in row:
        raise ValueError(f"text_column={text_column!r} is not in {where}: {sorted(row)}")
    if not isinstance(row[text_column], str):
        raise ValueError(f"text_column={text_column!r} in {where} is not text: {row[text_column]!r}")
    return row[text_column]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error


def _read_or_none(file: Path) -> str | None:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None


def _dataset(rows: Iterator[dict[str, Any]]) -> Dataset:
    return Dataset.from_list(list(rows))
