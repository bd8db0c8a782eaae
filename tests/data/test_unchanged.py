"""Pinned digests of what is kept on disk and read from it: a change of one raises `data.preparation.VERSION`."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from data.preparation import VERSION
from tests.data.conftest import Make

PINNED = {
    "version": 1,
    "held out": "2b62d139bb9fe455",
    "store": "b41b3ce5377ebf23",
    "edition": "91f37fcd0f87b992",
    "rows": "d67d7df61df14092",
    "whole": "7ff98c28aaeb2709",
}


def digest_of(folder: Path, pattern: str) -> str:
    found = hashlib.blake2b(digest_size=8)
    for file in sorted(folder.rglob(pattern)):
        found.update(file.relative_to(folder).as_posix().encode() + file.read_bytes())
    return found.hexdigest()


@pytest.fixture(scope="module")
def found(make: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("cache")
    prepared = make(cache_dir=folder).prepared
    whole = make(cache_dir=folder, packing="whole", sequence_length=20_000).prepared
    rows, others = prepared.rows(), whole.rows()
    names = [document.name for domain in prepared.settings.sources for document in prepared.survey.held_out(domain)]
    return {
        "version": VERSION,
        "held out": hashlib.blake2b(" ".join(names).encode(), digest_size=8).hexdigest(),
        "store": digest_of(prepared.store.folder, "*.ids"),
        "edition": digest_of(prepared.edition_folder("long", 0), "*.ids"),
        "rows": hashlib.blake2b(b"".join(rows[i].tokens.tobytes() for i in range(300)), digest_size=8).hexdigest(),
        "whole": hashlib.blake2b(b"".join(others[i].tokens.tobytes() for i in range(20)), digest_size=8).hexdigest(),
    }


@pytest.mark.parametrize("what", PINNED)
def test_what_is_kept_is_unchanged(found: dict[str, Any], what: str) -> None:
    assert found[what] == PINNED[what]
