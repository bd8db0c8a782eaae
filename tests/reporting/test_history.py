"""Tables of a run are read once, and no more of them than is asked for."""

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from dsv3.checkpoint.older_runs import columns_of, read_parts
from dsv3.reporting import experts, history
from dsv3.reporting.dashboard.read_ahead import READS, ReadAhead
from dsv3.reporting.dashboard.watched import SHARE, Watched
from dsv3.reporting.history import History, find_runs
from dsv3.reporting.routing_history import SCALARS, by_layer
from dsv3.reporting.style import numbers, strided
from tests.reporting.made_up import MadeUpRun


@pytest.fixture
def made(tmp_path: Path) -> MadeUpRun:
    run = MadeUpRun(tmp_path / "seed1", layers=3, experts=8)
    run.interval()
    return run


def aged(folder: Path) -> None:
    """As if nothing had changed in it for a minute."""
    os.utime(folder, (time.time() - 60, time.time() - 60))


def test_a_folder_is_listed_again_once_it_may_have_changed(made: MadeUpRun, monkeypatch: pytest.MonkeyPatch) -> None:
    run, folder = History(made.path, "x"), made.path / "metrics" / "train"
    listed: list[str] = []
    table_parts = history.table_parts
    monkeypatch.setattr(history, "table_parts", lambda path, name: listed.append(name) or table_parts(path, name))
    aged(folder)
    assert run.parts("metrics/train") is run.parts("metrics/train")
    assert listed == ["metrics/train"]
    made.interval()
    assert len(run.parts("metrics/train")) == 2
    changed = folder.stat().st_mtime_ns
    made.interval()
    os.utime(folder, ns=(changed, changed))  # within the same tick of the file system's clock
    assert len(run.parts("metrics/train")) == 3


def test_of_a_table_the_columns_that_are_asked_for_are_read(made: MadeUpRun) -> None:
    run = History(made.path, "x")
    assert list(run.table("metrics/routing", ("tokens", "nodes", "no such"))) == ["tokens", "nodes"]
    assert list(run.newest("metrics/routing", ("layer",)).layer) == ["layers.1", "layers.2", "mtp.0"]
    assert run.newest("metrics/routing", ("layer",)) is run.newest("metrics/routing", ("layer",))
    made.interval()
    assert len(run.table("metrics/routing", ("tokens",))) == 6
    assert len(run.newest("metrics/routing")) == 3


def test_columns_of_older_runs_have_the_names_of_today(tmp_path: Path) -> None:
    part = tmp_path / "routing" / "part-1.parquet"
    part.parent.mkdir()
    pd.DataFrame({"tokens": [1], "violation_step": [0.5], "limited": [0.25]}).to_parquet(part)
    assert columns_of(part) == ["tokens", "max_vio_step", "group_limited_fraction"]
    assert read_parts([part], ("max_vio_step",)).to_dict("list") == {"max_vio_step": [0.5]}


def test_a_table_is_derived_once_for_the_same_rows(made: MadeUpRun) -> None:
    run = History(made.path, "x")
    assert run.train() is run.train()
    before = run.train()
    made.interval()
    assert len(run.train()) == 2 * len(before)


def test_loads_of_layers_with_different_numbers_of_experts() -> None:
    """Against the rows one by one; the second layer has fewer experts, the third one row without a load."""
    import pyarrow

    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for tokens in (100, 200, 300):
        for layer, n in (("a", 4), ("b", 2), ("c", 6)):
            counts = rng.integers(1000, 9000, 2 * n)
            row = {"load": counts[:n] + counts[n:], "domain_load": counts, "bias": rng.normal(size=n), "nodes": tokens}
            if (layer, tokens) == ("c", 200):
                row |= {"load": None, "domain_load": None}
            rows.append({"tokens": tokens, "layer": layer, **row})
    loads = by_layer(pyarrow.Table.from_pylist(rows), ["x", "y"])
    assert {name: load.tokens_T.tolist() for name, load in loads.items()} == {
        "a": [100, 200, 300], "b": [100, 200, 300], "c": [100, 300]
    }  # fmt: skip
    for row in rows:
        if row["load"] is not None:
            load = loads[row["layer"]]
            at = load.tokens_T.tolist().index(row["tokens"])
            assert np.allclose(load.load_TE[at], row["load"] / row["load"].mean(), rtol=1e-6)
            of_domain_XE = row["domain_load"].reshape(2, -1)
            assert np.allclose(load.domain_TXE[at], of_domain_XE / of_domain_XE.mean(1, keepdims=True), rtol=1e-6)
            assert np.allclose(load.share_TX[at], of_domain_XE.sum(1) / of_domain_XE.sum(), rtol=1e-6)
            assert np.allclose(load.bias_TE[at], row["bias"], rtol=1e-6)
            assert load.scalars_TS[at, SCALARS.index("nodes")] == row["tokens"]
            assert np.isnan(load.scalars_TS[at, SCALARS.index("margin")])


def test_tables_are_read_ahead_once_and_then_nothing_is_done(made: MadeUpRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3.reporting.dashboard.read_ahead.QUIET_SECONDS", 0.0)
    (made.path / "metrics" / "stability" / "part-000000000000001.parquet").write_text("no Parquet")
    run = History(made.path, "x")
    read: list[str] = []
    table = run.table
    run.table = lambda name, columns=(): read.append(name) or table(name, columns)  # type: ignore[method-assign]
    rows: list[History] = []
    ahead = ReadAhead(threading.RLock(), rows.append)
    ahead.asked({"x": run}, "x")
    assert ahead._thread is not None
    ahead._thread.join(30)
    assert rows == [run]
    assert not ahead._thread.is_alive()
    assert {"metrics/train", "timing/train", "metrics/validation", "metrics/quantisation", "metrics/routing"} <= {*read}
    assert len(run._routing.layers) == 3
    assert len(ahead._done) == len(READS) + 1
    count, thread = len(read), ahead._thread
    ahead.asked({"x": run}, "x")
    assert ahead._thread is thread, "there is nothing left to read"
    assert len(read) == count


def test_nothing_is_read_ahead_while_someone_asks(made: MadeUpRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dsv3.reporting.dashboard.read_ahead.QUIET_SECONDS", 0.5)
    read: list[float] = []
    monkeypatch.setattr("dsv3.reporting.dashboard.read_ahead.READS", [lambda run: read.append(time.monotonic())] * 3)
    ahead = ReadAhead(threading.RLock(), lambda run: None)
    ahead.pause()
    ahead.asked({"x": History(made.path, "x")}, "x")
    for _ in range(10):
        ahead.pause()
        last = time.monotonic()
        time.sleep(0.1)
    assert ahead._thread is not None
    ahead._thread.join(30)
    assert len(read) == 3
    assert read[0] >= last + 0.4


def test_rows_are_read_for_as_long_as_someone_waits(tmp_path: Path) -> None:
    for seed in range(3):
        MadeUpRun(tmp_path / f"seed{seed}", layers=1, experts=2, seed=seed).interval()
    watched = Watched(tmp_path)
    runs = [*watched.look().values()]
    before = watched.stamp(runs)
    assert watched.rows(runs, seconds=-1) == {}
    (one,) = watched.rows(runs[:1])
    assert list(watched.rows(runs, seconds=-1)) == [one]
    assert watched.stamp(runs) != before, "a row has come"
    assert list(watched.rows(runs)) == ["seed0", "seed1", "seed2"]


def test_looking_for_changes_takes_little_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    MadeUpRun(tmp_path / "seed0", layers=1, experts=2).interval()
    watched = Watched(tmp_path)
    (run,) = watched.look().values()
    clock, looked = [100.0], []
    monkeypatch.setattr("dsv3.reporting.dashboard.watched.time.monotonic", lambda: clock[0])

    def slow(run: History) -> str:
        looked.append(clock[0])
        clock[0] += 0.1
        return "same"

    monkeypatch.setattr("dsv3.reporting.dashboard.watched.stamp", slow)
    for _ in range(100):
        watched.stamp([run])
        clock[0] += 1.0
    assert len(looked) == pytest.approx(100 / (0.1 * SHARE), abs=3)


def test_stability_of_many_layers_is_a_map(tmp_path: Path) -> None:
    run = MadeUpRun(tmp_path / "seed1", layers=experts.MOST_LEGENDS + 1, experts=4)
    for _ in range(3):
        run.interval()
    (trace,) = experts.stability(History(run.path, "x")).data
    assert trace.type == "heatmap"
    assert list(trace.y) == run.names
    assert trace.z.shape == (len(run.names), 3)
    assert np.allclose(trace.z, 80.0)


def test_columns_of_a_map_are_equally_far_apart_with_the_last_among_them() -> None:
    for number, most in ((0, 5), (1, 5), (5, 5), (6, 5), (417, 300), (1000, 300)):
        at = strided(number, most)
        assert len(at) <= most
        assert len(at) >= min(number, most // 2)
        assert number == 0 or at[-1] == number - 1
        assert len({*np.diff(at)}) <= 1


def test_tokens_beyond_32_bits_are_drawn_exactly() -> None:
    assert numbers(np.array([1, 3_000_000_001])).tolist() == [1.0, 3_000_000_001.0]
    assert numbers(np.array([1, 3_000_000_001])).dtype == np.float64
    assert numbers(np.array([1, 2])).dtype.kind == "i"


def test_runs_are_found_and_read_as_they_grow(tmp_path: Path) -> None:
    made_up = MadeUpRun(tmp_path / "runs" / "study" / "seed1", layers=3, experts=8)
    for _ in range(3):
        made_up.interval()
    (tmp_path / "runs" / "study" / "seed1.old-1").mkdir()
    (tmp_path / "runs" / "study" / "seed1.old-1" / "config.yaml").write_text("{}")
    (run,) = find_runs(tmp_path / "runs")
    assert (run.name, run.state, run.tokens) == ("study/seed1", "training", made_up.tokens)
    before = run.table("metrics/train")
    assert run.table("metrics/train") is before, "nothing new: nothing is read"
    made_up.interval()
    assert len(run.table("metrics/train")) == made_up.steps
    assert run.routing().moments[-1] == made_up.tokens
    made_up.folder.drop_after(made_up.tokens - 1)
    assert run.table("metrics/train").equals(before), "back at the checkpoint before"
    assert run.routing().moments[-1] == before.tokens.iloc[-1]
    made_up.folder.write_summary({})
    assert run.state == "finished"
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_runs(tmp_path / "nowhere")


def test_a_corrupt_summary_is_told_once_and_read_when_it_changes(
    made: MadeUpRun, caplog: pytest.LogCaptureFixture
) -> None:
    run = History(made.path, "x")
    assert run.summary is None
    run.folder.summary_path.write_text('{"run": ')
    assert run.summary is run.summary is None
    assert sum("is corrupt" in message for message in caplog.messages) == 1
    run.folder.write_summary({"run": "a summary"})
    assert run.summary is not None
