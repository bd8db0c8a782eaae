"""Texts through the scheduler are those of `generate`; they leave nothing behind, and no account waits for another."""

import random
import threading
import time
from typing import Any

import pytest

from dsv3.inference.backend import DecoderBackend
from dsv3.inference.engine import Engine
from dsv3.inference.generation import generate
from dsv3.inference.prefixes import SHORTEST_SHARED
from dsv3.inference.sampling import Settings
from dsv3.model.layers import cached_weight_casts
from dsv3.serving.engine_thread import EngineThread
from dsv3.serving.scheduler import BusyError, Job, Limits, News, Scheduler
from dsv3.serving.served_model import ModelSettings
from tests.inference.test_engine import assert_equal_text, model_of, parts, prompts_of

KEPT = 2000


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Bench:
    """A scheduler over a tiny model, driven by hand, and the news of each job."""

    def __init__(self, *, kept: int = KEPT, prefill: int = ModelSettings.prefill, **limits: int) -> None:
        self.model = model_of()
        self.backend = DecoderBackend(self.model)
        self.engine = Engine(self.backend, prefill=prefill, kept_positions=kept)
        self.clock = Clock()
        self.scheduler = Scheduler(self.engine, Limits(**limits), wake=lambda: None, clock=self.clock)
        self.news: dict[Job, list[News]] = {}

    def job(self, prompt: list[int], account: str = "a", **settings: Any) -> Job:
        job = Job(account, prompt, Settings(**{"max_tokens": 5, **settings}), lambda news: self.news[job].append(news))
        self.news[job] = []
        self.scheduler.submit(job)
        return job

    def run(self) -> None:
        with cached_weight_casts(self.model):
            while self.scheduler.step() or self.scheduler.waiting:
                pass

    def run_steps(self, count: int) -> None:
        with cached_weight_casts(self.model):
            for _ in range(count):
                self.scheduler.step()

    def ids(self, job: Job) -> list[int]:
        return [token for news in self.news[job] for token in news.ids]

    def end(self, job: Job) -> str | None:
        return self.news[job][-1].end if self.news[job] else None

    def assert_nothing_held(self) -> None:
        assert not self.engine.rows
        assert not self.scheduler.running
        assert all(set(part.lengths) <= set(self.engine.kept.rows) for part in parts(self.backend))
        self.engine.kept.clear()
        assert self.engine.kept.positions == 0
        assert all(not part.lengths for part in parts(self.backend))


def test_texts_of_many_are_those_of_each_alone() -> None:
    """50 prompts of two accounts: joining while others write, with and without drafts, with beginnings of texts before,
    some read in many pieces."""
    bench, prompts = Bench(slots=8), prompts_of(50, 60)
    jobs = []
    with cached_weight_casts(bench.model):
        for i, prompt in enumerate(prompts):
            drafts, account = (0, 2, 0, 3)[i % 4], "ab"[i % 2]
            jobs.append(bench.job(prompt, account, max_tokens=3 + i % 6, drafts=drafts))
            if i % 3 == 2:
                bench.scheduler.step()
        bench.run()
        for prompt, job in zip(prompts, jobs, strict=True):
            alone = list(generate(bench.model, prompt, Settings(max_tokens=job.settings.max_tokens)))
            assert_equal_text(bench.model, prompt, bench.ids(job), alone)
    assert bench.scheduler.counts.copied_tokens > SHORTEST_SHARED
    bench.assert_nothing_held()


def test_a_conversation_goes_on_from_what_was_read_before() -> None:
    """Each turn repeats all before it. With drafts, from finished rows: every text is that of a cold start."""
    bench = Bench()
    prompt = [i * 7 % 50 for i in range(SHORTEST_SHARED + 3)]
    for turn in range(4):
        job = bench.job(prompt, drafts=(2, 0)[turn % 2], max_tokens=9)
        bench.run()
        assert_equal_text(
            bench.model, prompt, bench.ids(job), list(generate(bench.model, prompt, Settings(max_tokens=9)))
        )
        assert job.row is not None
        assert turn in (0, 2) or job.row.copied >= SHORTEST_SHARED, "a text without drafts may copy from any"
        prompt = [*prompt, *bench.ids(job), 3, 1, 4]
    bench.assert_nothing_held()


def test_accounts_share_nothing() -> None:
    """Neither at once nor afterwards: how fast an answer comes says nothing of what others asked."""
    bench, prompt = Bench(slots=4), [i % 50 for i in range(3 * SHORTEST_SHARED)]
    first, second = bench.job(prompt, "a"), bench.job(prompt, "b")
    bench.run()
    later, own = bench.job(prompt, "c"), bench.job(prompt, "a")
    bench.run()
    copied = [job.row.copied if job.row else None for job in (first, second, later, own)]
    assert copied == [0, 0, 0, len(prompt) - 1]


def test_kept_texts_stay_within_their_bytes_and_the_oldest_go_first() -> None:
    bench = Bench(kept=3 * (SHORTEST_SHARED + 10))
    prompts = [[start, *range(SHORTEST_SHARED - 1)] for start in (47, 48, 49)]
    prompts = [[token % 50 for token in prompt] for prompt in prompts]
    for prompt in (*prompts, prompts[0]):
        bench.job(prompt)
        bench.run()
        assert bench.engine.kept.positions <= bench.engine.kept.limit
        assert bench.engine.kept.positions == sum(bench.backend.caches.lengths.values())
    bench.job([46, *prompts[0][1:]])
    bench.run()
    assert [row.tokens[0] for row in bench.engine.kept.rows.values()] == [49, 47, 46], "47 was used again, 48 not"


def test_a_thousand_cancelled_texts_leave_nothing() -> None:
    bench, draw = Bench(slots=6, waiting=100, account_waiting=100), random.Random(0)
    jobs, beginning = [], [1] * (SHORTEST_SHARED + 1)
    with cached_weight_casts(bench.model):
        while len(jobs) < 1000:
            if bench.scheduler.waiting < 30:
                prompt = draw.choice([beginning, []]) + [draw.randrange(50) for _ in range(draw.randint(1, 9))]
                jobs.append(bench.job(prompt, draw.choice("abc"), max_tokens=50, drafts=draw.choice((0, 0, 2))))
            if draw.random() < 0.9:
                bench.scheduler.cancel(draw.choice(jobs[-40:]))
            if draw.random() < 0.06:
                bench.scheduler.step()
        for job in jobs:
            bench.scheduler.cancel(job)
    bench.run()
    assert all(bench.end(job) is not None for job in jobs)
    assert bench.scheduler.counts.ends["cancelled"] > 800
    bench.assert_nothing_held()


def test_the_account_with_fewest_texts_is_next() -> None:
    bench = Bench(slots=4, account_slots=3)
    greedy = [bench.job([1, 2, i], "greedy", max_tokens=30) for i in range(9)]
    bench.scheduler.step()
    assert len(bench.scheduler.running) == 3, "an account has its own limit"
    modest = [bench.job([3, i], name, max_tokens=2) for i in range(2) for name in ("x", "y")]
    while not all(bench.end(job) for job in modest):
        bench.scheduler.step()
    assert not any(bench.end(job) for job in greedy)


def test_too_many_waiting_are_refused_with_a_time() -> None:
    bench = Bench(slots=1, waiting=5, account_waiting=3)
    for _ in range(3):
        bench.job([1, 2], "a")
    with pytest.raises(BusyError, match="this account has 3") as busy:
        bench.job([1, 2], "a")
    assert 1 <= busy.value.retry_after <= 60
    bench.job([1], "b")
    bench.job([1], "b")
    with pytest.raises(BusyError, match="the server has 5"):
        bench.job([1], "c")
    bench.run()
    assert bench.scheduler.counts.refused == 2


def test_texts_end_when_their_time_is_over() -> None:
    bench = Bench(slots=1)
    running, waiting = bench.job([1, 2], max_tokens=400), bench.job([3, 4], max_tokens=400)
    bench.scheduler.step()
    bench.clock.now = running.seconds - 1
    bench.scheduler.step()
    assert bench.scheduler.seconds_left() == pytest.approx(1)
    bench.clock.now += 2
    bench.scheduler.step()
    assert (bench.end(running), bench.end(waiting)) == ("timeout", "timeout")
    bench.assert_nothing_held()


def test_a_short_prompt_waits_neither_for_long_ones_nor_for_texts() -> None:
    """Eight write, two prompts of many pieces are being read: a prompt of 32 tokens has its first token in 3 steps."""
    bench = Bench(slots=16, account_slots=16)
    for i in range(8):
        bench.job([i, 1, 2], max_tokens=200)
    bench.scheduler.step()
    for i in range(2):
        bench.job([40 + i] * 2000)
    bench.scheduler.step()
    for i in range(10):
        short, steps = bench.job([i, *range(31)], max_tokens=1), 0
        while not bench.news[short]:
            bench.scheduler.step()
            steps += 1
        assert steps <= 3
    assert all(row.read < 2000 for row in bench.engine.rows.values() if row.prompt == 2000), "the long ones still read"


def test_prompts_are_read_in_the_pass_of_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight write, and prompts that begin and go on are read: one pass of few tokens, whatever their lengths."""
    bench = Bench(slots=16, account_slots=16)
    for i in range(8):
        bench.job([i, 1, 2], max_tokens=200)
    bench.run_steps(2)
    bench.job([7] * 400)
    bench.run_steps(1)
    bench.job([8] * 33)
    passes: list[tuple[int, ...]] = []
    decode_states = bench.model.decode_states

    def counted(tokens_BT: Any, caches: Any) -> Any:
        passes.append(tuple(tokens_BT.shape))
        return decode_states(tokens_BT, caches)

    monkeypatch.setattr(bench.model, "decode_states", counted)
    bench.run_steps(3)
    assert passes == [(8 + ModelSettings.prefill, 1)] * 3


def test_a_dead_engine_ends_all_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, thread = Bench(slots=1), EngineThread()
    jobs = [bench.job([1, 2, 3]), bench.job([1, 2, 3])]

    def broken(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(bench.engine, "step", broken)
    thread.start([bench.scheduler], [cached_weight_casts(bench.model)])
    thread._thread.join(10)
    assert not thread.alive
    assert [bench.end(job) for job in jobs] == ["failed", "failed"]
    with pytest.raises(RuntimeError, match="stopped"):
        bench.job([1])


def test_the_thread_serves_many_threads_and_stops() -> None:
    bench, thread = Bench(slots=4), EngineThread()
    bench.scheduler.wake = thread.wake
    bench.scheduler.clock = time.monotonic
    thread.start([bench.scheduler], [cached_weight_casts(bench.model)])
    jobs: list[Job] = []

    def ask(account: str) -> None:
        for i in range(10):
            jobs.append(bench.job([i, 1], account))
            if i % 3 == 0:
                bench.scheduler.cancel(jobs[-1])

    askers = [threading.Thread(target=ask, args=(name,)) for name in "abcd"]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    deadline = time.monotonic() + 60
    while not all(bench.end(job) for job in jobs) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert all(bench.end(job) in ("length", "cancelled") for job in jobs)
    thread.stop()
    assert not thread.alive
    bench.assert_nothing_held()
