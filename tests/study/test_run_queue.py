"""The queue of a study: claims, dead workers, failures, order, and what a stranger's queue may not say."""

import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from dsv3.config.compose import Composer, hydra_flags, opened
from dsv3.study import run_queue
from dsv3.study.run_queue import STALE, Entry, Queue, read_queue, seconds_left
from dsv3.study.worker import attempt, command, work
from tests.conftest import ROOT

FORKED = multiprocessing.get_context("fork")


def entry(run: str, number: int = 0, *, after: str | None = None, overrides: tuple[str, ...] = ()) -> Entry:
    return Entry(run, list(overrides), number, after, 100)


def finish(study: Path, run: str) -> None:
    (study / run).mkdir(parents=True, exist_ok=True)
    (study / run / "summary.json").write_text('{"tokens": 100, "seconds": 50.0}')


def filled(study: Path, *entries: Entry) -> Queue:
    queue = Queue(study)
    queue.write(entries, retry=False)
    return queue


def states(study: Path) -> dict[str, str]:
    return {run.entry.run: run.state for run in read_queue(study)}


def test_a_claim_holds_until_its_block_ends(tmp_path: Path) -> None:
    queue = filled(tmp_path, one := entry("a/seed1"))
    with queue.claimed(one) as mine:
        assert mine
        (running,) = read_queue(tmp_path)
        assert running.state == "running"
        assert str(os.getpid()) in (running.worker or "")
        assert abs((running.since or 0) - time.time()) < 60
        with Queue(tmp_path).claimed(one) as others:
            assert not others
    assert states(tmp_path) == {"a/seed1": "waiting"}
    finish(tmp_path, "a/seed1")
    with queue.claimed(one) as mine:
        assert not mine
    assert not list((tmp_path / "queue").glob("*claim*")), "nothing is left behind"


def test_of_many_that_claim_at_once_one_does(tmp_path: Path) -> None:
    """With a dead claim before, so that all of them take over."""
    queue = filled(tmp_path, one := entry("a"))
    (queue.folder / f"{one.name}.claim-1").write_text(json.dumps({"kernel": run_queue._kernel()}))
    barrier, taken, leave = threading.Barrier(12), [], threading.Event()

    def claim() -> None:
        own = Queue(tmp_path)
        barrier.wait()
        with own.claimed(one) as mine:
            taken.append(mine)
            while not leave.is_set() and len(taken) < 12:
                leave.wait(0.01)

    threads = [threading.Thread(target=claim) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == [False] * 11 + [True]


def hold_until_killed(study: Path, one: Entry, ready: Path) -> None:
    with Queue(study).claimed(one) as mine:
        ready.write_text(str(mine))
        time.sleep(600)


def test_a_killed_workers_run_is_taken_up_at_once(tmp_path: Path) -> None:
    queue = filled(tmp_path, one := entry("a"))
    worker = FORKED.Process(target=hold_until_killed, args=(tmp_path, one, tmp_path / "ready"))
    worker.start()
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    with queue.claimed(one) as mine:
        assert not mine
    assert worker.pid is not None
    os.kill(worker.pid, signal.SIGKILL)
    worker.join()
    with queue.claimed(one) as mine:
        assert mine
        assert [path.name.rpartition("-")[2] for path in sorted(queue.folder.glob("*.claim-*"))] == ["1", "2"]


def test_a_worker_of_another_machine_is_dead_when_its_claim_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By this machine's clock alone: the other's may be wrong by hours."""
    queue = filled(tmp_path, one := entry("a"))
    claim = queue.folder / f"{one.name}.claim-1"
    claim.write_text(json.dumps({"worker": "elsewhere", "kernel": "another"}))
    os.utime(claim, (time.time() + 5000, time.time() + 5000))
    now = [1000.0]
    monkeypatch.setattr(run_queue.time, "monotonic", lambda: now[0])
    assert queue.states()[0].state == "running"
    now[0] += STALE - 1
    assert queue.states()[0].state == "running"
    os.utime(claim, (time.time() + 5015, time.time() + 5015))
    now[0] += 2
    assert queue.states()[0].state == "running", "it was touched"
    now[0] += STALE + 1
    assert queue.states()[0].state == "waiting"


def test_a_worker_that_slept_until_it_was_replaced_is_interrupted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_queue, "HEARTBEAT", 0.01)
    told = threading.Event()
    before = signal.signal(signal.SIGTERM, lambda *_: told.set())
    queue = filled(tmp_path, one := entry("a"))
    try:
        with queue.claimed(one):
            (queue.folder / f"{one.name}.claim-2").touch()
            assert told.wait(5)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_run_over_which_workers_die_is_given_up(tmp_path: Path) -> None:
    queue = filled(tmp_path, one := entry("a"))
    for number in range(1, run_queue.MOST_DEATHS + 1):
        assert states(tmp_path) == {"a": "waiting"}
        (queue.folder / f"{one.name}.claim-{number}").write_text(json.dumps({"kernel": run_queue._kernel()}))
    assert queue.states()[0].why == "4 workers died over it"
    queue.retry(one)
    assert states(tmp_path) == {"a": "waiting"}


def test_failures_stop_no_others_and_are_tried_again_only_when_asked(tmp_path: Path) -> None:
    runs = (entry("bad", 0), entry("good", 1), entry("next", 2, after="bad"), entry("last", 3, after="next"))
    queue, trained = filled(tmp_path, *runs), []

    def train(one: Entry) -> str | None:
        trained.append(one.run)
        if one.run == "bad" and trained.count("bad") == 1:
            return "non-finite loss"
        finish(tmp_path, one.run)
        return None

    work(queue, train)
    assert trained == ["bad", "good"]
    assert states(tmp_path) == {"bad": "failed", "good": "finished", "next": "failed", "last": "failed"}
    assert [run.why for run in read_queue(tmp_path)] == [
        "non-finite loss",
        None,
        "it begins with bad, which failed",
        "it begins with next, which failed",
    ]
    work(queue, train)
    assert trained == ["bad", "good"]
    queue.write(runs, retry=True)
    work(queue, train)
    assert trained == ["bad", "good", "bad", "next", "last"]
    assert set(states(tmp_path).values()) == {"finished"}


def work_slowly(study: Path, out: Path) -> None:
    def train(one: Entry) -> None:
        with (out / f"{one.run}-{os.getpid()}").open("w"):
            time.sleep(0.15)
        finish(study, one.run)

    work(Queue(study), train)


def test_two_workers_share_a_study_and_one_finishes_it_when_the_other_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dsv3.study.worker.POLL", 0.02)
    (out := tmp_path / "out").mkdir()
    filled(tmp_path, *(entry(f"run{i}", i) for i in range(8)), entry("then", 8, after="run0"))
    workers = [FORKED.Process(target=work_slowly, args=(tmp_path, out)) for _ in range(2)]
    for worker in workers:
        worker.start()
    while len({path.name.rpartition("-")[2] for path in out.iterdir()}) < 2:
        time.sleep(0.01)
    assert workers[0].pid is not None
    os.kill(workers[0].pid, signal.SIGKILL)
    workers[1].join(20)
    workers[0].join()
    assert workers[1].exitcode == 0
    assert set(states(tmp_path).values()) == {"finished"}
    trained = [path.name.partition("-")[0] for path in out.iterdir()]
    assert len(trained) <= 10, "only the killed worker's run is trained twice"
    assert len(set(trained)) == 9


def add_a_run_later(study: Path, then: Callable[[], object]) -> None:
    with filled(study, entry("first", 0)).growing():
        while states(study) != {"first": "finished"}:
            time.sleep(0.01)
        time.sleep(0.2)
        filled(study, entry("second", 1))
        then()


@pytest.mark.parametrize("then", [int, partial(os._exit, 1)], ids=["ends", "dies"])
def test_workers_stay_while_a_command_may_add_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: Callable[[], object]
) -> None:
    monkeypatch.setattr("dsv3.study.worker.POLL", 0.02)
    (out := tmp_path / "out").mkdir()
    command = FORKED.Process(target=add_a_run_later, args=(tmp_path, then))
    command.start()
    while not Queue(tmp_path).grows():
        time.sleep(0.01)
    worker = FORKED.Process(target=work_slowly, args=(tmp_path, out))
    worker.start()
    worker.join(20)
    command.join()
    assert worker.exitcode == 0
    assert states(tmp_path) == {"first": "finished", "second": "finished"}
    with Queue(tmp_path).growing():
        assert len(list((tmp_path / "queue").glob("more-*"))) == 1, "what a dead command left is removed"
    assert not list((tmp_path / "queue").glob("more-*"))


def test_an_interrupted_run_is_left_to_others(tmp_path: Path) -> None:
    queue = filled(tmp_path, one := entry("a"))

    def train(_: Entry) -> str | None:
        raise SystemExit(143)

    with pytest.raises(SystemExit):
        attempt(queue, one, train)
    assert states(tmp_path) == {"a": "waiting"}


def test_the_end_is_expected_by_the_speed_of_finished_runs(tmp_path: Path) -> None:
    queue = filled(tmp_path, *(entry(f"run{i}", i) for i in range(4)))
    assert seconds_left(tmp_path, queue.states(), time.time()) is None
    finish(tmp_path, "run0")
    with queue.claimed(entry("run1", 1)):
        runs = queue.states()
        since = next(run.since for run in runs if run.state == "running") or 0
        assert seconds_left(tmp_path, runs, since + 10) == pytest.approx(140)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "[" * 100_000,
        '{"run": "../../outside", "overrides": [], "number": 0, "after": null, "tokens": 1}',
        '{"run": "/etc", "overrides": [], "number": 0, "after": null, "tokens": 1}',
        '{"run": "a", "overrides": "x=1", "number": 0, "after": null, "tokens": 1}',
        '{"run": "another", "overrides": [], "number": 0, "after": null, "tokens": 1}',
        '{"run": "a", "overrides": [], "number": 0, "after": null, "tokens": 1, "more": 1}',
    ],
)
def test_files_that_are_no_entries_are_refused_by_name(tmp_path: Path, content: str) -> None:
    queue = filled(tmp_path, one := entry("a"))
    (queue.folder / f"{one.name}.json").write_text(content)
    with pytest.raises(ValueError, match=f"{one.name}.json: not the file of a run"):
        queue.states()


@pytest.fixture
def composer() -> Iterator[Composer]:
    with opened("train", hydra_flags(["--config-dir", str(ROOT / "tests" / "conf")])) as made:
        yield made


HARMLESS = ("experiment=table5_balancing", "balancing=loss_free", "study.arm=loss_free", "seed=1", "precision=bf16")


REFUSED = (
    "hydra.searchpath=[file:///tmp/evil]",
    "hydra/launcher=joblib",
    "+hydra.job.chdir=true",
    "hydra={mode:RUN}",
    "experiment=../../../../tmp/evil",
    "+callbacks@callbacks.mine=../../evil",
    "+a/b=c",
    "allow=[os.system]",
    "run.on_end=[rm,-rf,/]",
    "run={on_end:[rm]}",
    "benchmarks.folders=[/tmp/evil]",
    "data.cache_dir=/etc",
    "run.dir=/tmp/elsewhere",
    "run.dir=runs/table5_balancing/../../loss_free/seed1",
    "run.name=elsewhere",
    "router._target_=os.system",
    "+callbacks.mine={_target_:os.system}",
    "study.question=${oc.env:SECRET}",
    "study.question=${${a}:SECRET}",
    "study.question='${oc.env:SECRET}'",
    r"study.question=$\{oc.env\:SECRET\}",
    "study.arms={a:[{b:'${oc.env:SECRET}'}]}",
    "seed=1,2",
    "--config-dir=/tmp",
    "=",
)


def test_a_queue_may_not_say_more_than_a_run_folder(tmp_path: Path, composer: Composer) -> None:
    study = tmp_path / "runs" / "table5_balancing"
    said = {}
    for override in REFUSED:
        try:
            said[override] = command(composer, study, entry("loss_free/seed1", overrides=(*HARMLESS, override)))
        except ValueError as error:
            said[override] = str(error)
    assert [override for override, text in said.items() if "loss_free-seed1-" not in str(text).partition(":")[0]] == []


def test_a_run_is_trained_in_the_folder_from_which_it_lies_in_the_study(tmp_path: Path, composer: Composer) -> None:
    """`run.init_from` of a later stage and `study.arms` are as the command that began the study gave them."""
    study = tmp_path / "runs" / "table5_balancing"
    given = (*HARMLESS, "run.init_from=runs/${run.experiment}/none/seed${seed}", "~callbacks.ema", "run.tokens=5_000")
    found = command(composer, study, entry("loss_free/seed1", overrides=given))
    assert found.folder == tmp_path
    assert found.overrides == list(given)
    absolute = (*HARMLESS, f"run.dir={study}/loss_free/seed1")
    assert command(composer, study, entry("loss_free/seed1", overrides=absolute)).folder == Path.cwd()
    with pytest.raises(ValueError, match="no option in conf/ names"):
        command(composer, study, entry("loss_free/seed1", overrides=(*HARMLESS, "router._target_=mine.Router")))
    allowed = command(
        composer,
        study,
        entry("loss_free/seed1", overrides=(*HARMLESS, "router._target_=mine.Router")),
        allow=["mine.Router"],
    )
    assert allowed.overrides[-1] == "allow=[mine.Router]"
