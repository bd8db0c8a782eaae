"""`hf://`: rows of a data set on Hugging Face's Hub, through its own file system."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import HfFileSystem, constants

from data.example_sources import example_files
from data.sources import BadTextError
from tests.data.fake_hub import serving

ROWS = [{"messages": [{"role": "user", "content": f"{n} é"}]} for n in range(300)]


@pytest.fixture
def files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[dict[str, bytes]]:
    lines = [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS]
    files = {"train/a.jsonl": b"".join(lines[:200]), "train/b.jsonl": b"".join(lines[200:]), "README.md": b"# mine"}
    with serving("me/mine", files) as address:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{address}/{template.split('/', 3)[3]}")
        HfFileSystem.clear_instance_cache()
        yield files
    HfFileSystem.clear_instance_cache()


def test_a_file_and_a_folder_of_a_data_set(files: dict[str, bytes]) -> None:
    folder = example_files("hf://datasets/me/mine/train")
    assert [found.row for found in folder.rows()] == ROWS
    one = example_files("hf://datasets/me/mine/train/b.jsonl")
    assert [found.row for found in one.rows()] == ROWS[200:]
    assert folder.identity() == example_files("hf://datasets/me/mine/train").identity() != one.identity()


def test_other_rows_under_the_same_name_are_another_source(files: dict[str, bytes]) -> None:
    before = example_files("hf://datasets/me/mine/train").identity()
    files["train/b.jsonl"] = files["train/b.jsonl"].replace(b"299", b"300")
    HfFileSystem.clear_instance_cache()  # as another process would
    assert example_files("hf://datasets/me/mine/train").identity() != before


def test_what_is_wrong_is_named(files: dict[str, bytes]) -> None:
    for path in ("hf://datasets/me/mine/nothing", "hf://datasets/me/other"):
        with pytest.raises(ValueError, match=path):
            list(example_files(path).rows())
    files["train/a.jsonl"] = b'{"messages": []}\n[]\n'
    with pytest.raises(BadTextError, match=r"row 2 of .*me/mine/train/a\.jsonl"):
        list(example_files("hf://datasets/me/mine/train/a.jsonl").rows())
