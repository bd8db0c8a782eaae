"""`python -m data prepare|stats|show`."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from data.tools._corpus import show
from data.tools._rows import in_parts
from dsv3.cli import main
from tests.data.conftest import ROOT, words


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides for a small folder of text, with a binary file among it."""
    folder = tmp_path_factory.mktemp("texts")
    for number in range(40):
        (folder / f"{number}.txt").write_text(words(seed=number, count=150))
    (folder / "picture.bin").write_bytes(b"\x89PNG\x00\x00")
    cache = tmp_path_factory.mktemp("cache")
    return [
        "data=files",
        f"data.sources.text.path={folder}",
        f"data.cache_dir={cache}",
        "tokenizer.vocab_size=300",
        "data.sequence_length=256",
        "data.fim.rate=0.5",
        "data.held_out_fraction=0.2",
        "run.tokens=20_000",
    ]


def called(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "format=json"], package="data.tools") == 0
    return json.loads(capsys.readouterr().out)


def test_stats_count_what_is_trained_on_held_out_and_left_out(
    corpus: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    found = called(capsys, "prepare", *corpus)
    assert found == called(capsys, "stats", *corpus)
    text = found["domains"]["text"]
    assert text["documents"] == 40
    assert 0 < text["held_out_documents"] < 20
    assert text["training_documents"] == 40 - text["held_out_documents"] - text["near_duplicates_dropped"]
    assert text["left_out"] == {"binary": 1}
    assert text["left_out_names"] == [["picture.bin", "binary"]]
    assert text["epochs_of_the_run"] == pytest.approx(20_000 / text["tokens"], rel=0.02)


def test_tables_name_what_was_left_out(corpus: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", *corpus], package="data.tools") == 0
    shown = capsys.readouterr().out
    assert "left out 1 binary" in shown
    assert "picture.bin" in shown


def test_the_table_of_a_billion_tokens_fits_in_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    figures = {"documents": 1_234_317, "near_duplicates_dropped": 1234, "bytes": 5 * 10**9, "tokens": 1_669_123_000}
    figures |= dict.fromkeys(("bytes_per_token", "held_out_share", "epochs_of_the_run"), 0.5)
    nothing = {"copies_of_held_out_dropped": 0, "empty": 0, "left_out": {}, "left_out_names": []}
    show({"domains": {"prose": figures | nothing}})
    assert "1,669,123,000" in capsys.readouterr().out


def test_show_gives_rows_with_their_documents_and_parts(corpus: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    rows = called(capsys, "show", "rows=30", *corpus)["rows"]
    again = called(capsys, "show", "rows=2", "first=7", *corpus)["rows"]
    assert rows[7:9] == again
    parts = {part["part"] for row in rows for document in row["documents"] for part in document}
    assert parts == {"text", "prefix", "suffix", "middle"}
    assert {row["domain"] for row in rows} == {"text"}


class Marks:
    """A tokenizer of letters, whose special tokens are the numbers from 1000."""

    bos, eos, pad, fim_begin, fim_hole, fim_end = range(1000, 1006)

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def test_documents_of_a_row_are_told_apart_also_where_the_row_cuts_them() -> None:
    m = Marks()
    a, b, c, d = map(ord, "abcd")
    assert in_parts([a, m.fim_hole, b, m.fim_end], m) == [  # type: ignore[arg-type]
        [{"part": "prefix", "text": "a"}, {"part": "suffix", "text": "b"}, {"part": "middle", "text": ""}]
    ]
    ids = [a, m.eos, m.bos, b, c, m.eos, m.bos, m.fim_begin, a, m.fim_hole, m.fim_end, c, m.eos, m.bos, d, m.pad]
    assert in_parts(ids, m) == [  # type: ignore[arg-type]
        [{"part": "text", "text": "a"}],
        [{"part": "text", "text": "bc"}],
        [{"part": "prefix", "text": "a"}, {"part": "suffix", "text": ""}, {"part": "middle", "text": "c"}],
        [{"part": "text", "text": "d"}],
    ]


def test_another_datamodule_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["stats", "--config-dir", str(ROOT / "tests" / "conf"), "data=synthetic"], package="data.tools")
    assert "data._target_=tests.synthetic.SyntheticData" in capsys.readouterr().err


def test_neither_the_tools_nor_the_processes_import_torch() -> None:
    code = (
        "import sys, data.processes, data.preparation, data.tools._corpus\n"
        "print([name for name in ('torch', 'lightning', 'datasets', 'grain') if name in sys.modules])"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stderr
