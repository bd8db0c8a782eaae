"""Run folders: tables, checkpoints, atomic writes."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from dsv3.checkpoint.older_runs import last_of, opened, read_part
from dsv3.checkpoint.run_folder import RunFolder, Table, find_run, is_valid, write_atomically


def test_tables_come_back_in_order_and_forget_what_is_past_a_checkpoint(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    table = folder.table("metrics/train")
    for tokens in range(1, 7):
        table.append({"tokens": tokens, "load": [tokens, 1]})
        if tokens % 2 == 0:
            folder.flush(tokens)
    assert folder.read("metrics/train").tokens.tolist() == [1, 2, 3, 4, 5, 6]
    assert list(folder.read("metrics/train").load[0]) == [1, 1]
    folder.drop_after(4)
    assert folder.read("metrics/train").tokens.tolist() == [1, 2, 3, 4]
    assert folder.read("metrics/nothing").equals(pd.DataFrame())


def test_one_row_of_a_wide_table_is_read_without_the_others(tmp_path: Path) -> None:
    table = Table(tmp_path / "coactivation")
    rows = [{"tokens": 8, "layer": layer, "pairs": [n + 0.5] * 40_000} for n, layer in enumerate("abca")]
    for row in rows:
        table.append(row)
    table.flush(8)
    (part,) = (tmp_path / "coactivation").iterdir()
    assert last_of(part, "a", where="layer", column="pairs").as_py() == rows[3]["pairs"]
    assert last_of(part, "b", where="layer", column="pairs").as_py() == rows[1]["pairs"]
    with pytest.raises(KeyError, match="d"):
        last_of(part, "d", where="layer", column="pairs")
    with opened(part) as file:
        assert file.num_row_groups == len(rows)
    read_part(part).to_parquet(part)  # as earlier versions wrote it
    assert last_of(part, "a", where="layer", column="pairs").as_py() == rows[3]["pairs"]


def test_the_table_that_tells_how_far_a_run_is_is_written_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, written = RunFolder(tmp_path), list[str]()
    monkeypatch.setattr(Table, "flush", lambda table, tokens: written.append(table.folder.name))
    for name in ("timing/seconds", "metrics/train", "metrics/validation", "metrics/a"):
        folder.table(name).append({"tokens": 1})
    folder.flush(1)
    assert written == ["seconds", "validation", "a", "train"]


def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    path = tmp_path / "summary.json"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_two_machines_that_write_the_same_file_are_not_in_each_others_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes of two machines may have the same number."""
    monkeypatch.setattr("os.getpid", lambda: 4242)
    path = tmp_path / "config.yaml"

    def write(text: str, *, meanwhile: str = "") -> None:
        def content(temporary: Path) -> None:
            temporary.write_text(text)
            if meanwhile:
                write(meanwhile)
                assert path.read_text() == meanwhile
            assert temporary.read_text() == text

        write_atomically(path, content)

    write("one", meanwhile="another")
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_newest_valid_checkpoint_skips_truncated_and_flipped_files(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    for tokens in (10, 20, 30):
        path = folder.checkpoint_path(tokens)
        path.parent.mkdir(exist_ok=True)
        torch.save({"state_dict": {"w": torch.randn(1000)}, "dsv3": {}, "callbacks": {}}, path)
    flipped = bytearray(folder.checkpoint_path(20).read_bytes())
    flipped[len(flipped) // 2] ^= 4
    folder.checkpoint_path(20).write_bytes(flipped)
    folder.checkpoint_path(30).write_bytes(folder.checkpoint_path(30).read_bytes()[:-50])
    assert [is_valid(path) for path in folder.checkpoints()] == [True, False, False]
    assert folder.newest_valid_checkpoint() == folder.checkpoint_path(10)


def test_find_run_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        find_run(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="no valid checkpoint"):
        find_run(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=f"python -m dsv3 import path={tmp_path} out=RUN"):
        find_run(tmp_path)


def test_move_aside_keeps_every_old_run(tmp_path: Path) -> None:
    for expected in ("run.old-1", "run.old-2"):
        folder = RunFolder(tmp_path / "run")
        folder.write_summary({"tokens": 1})
        assert folder.move_aside() == tmp_path / expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.old-1", "run.old-2"]
