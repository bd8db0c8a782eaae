"""News reaches an event loop at most once a step; of quick steps it waits for a moment."""

import asyncio
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from dsv3.serving.outbox import PAUSE, Outbox
from tests.serving.running import Running


class Bench:
    """An outbox, and how often its loop was woken. A step takes no time but what `now` is set to."""

    def __init__(self) -> None:
        self.now, self.handed, self.woken = 0.0, 0, list[str]()
        self.outbox = Outbox(lambda: self.now)
        self.wakes: dict[str, Callable[[], None]] = {}
        self.loop: Any = self

    def call_soon_threadsafe(self, call: Callable[[Any], None], *given: Any) -> None:
        self.handed += 1
        call(*given)

    def step(self, *texts: str, urgent: bool = False) -> list[str]:
        """Who was woken by a step that has news of these."""
        self.woken.clear()
        for text in texts:
            wake = self.wakes.setdefault(text, lambda text=text: self.woken.append(text))  # type: ignore[misc]
            self.outbox.put(self.loop, wake, urgent=urgent)
        self.outbox.send()
        return list(self.woken)


def test_a_loop_is_woken_once_for_all_texts_of_a_step() -> None:
    bench = Bench()
    assert bench.step("a", "b", "a", urgent=True) == ["a", "b"]
    assert bench.step() == []
    assert bench.handed == 1


def test_news_of_quick_steps_waits_for_a_moment() -> None:
    bench = Bench()
    bench.step("a", urgent=True)
    told = []
    for _ in range(8):
        bench.now += PAUSE / 3.9
        told.append(bench.step("a"))
    assert told == 2 * [[], [], [], ["a"]]
    bench.now += 2 * PAUSE
    assert [bench.step("a") for _ in range(2)] == [["a"], []], "steps that are slow are told of at once"
    assert bench.step("b", urgent=True) == ["a", "b"], "what waits goes with what is urgent"


def test_a_loop_that_is_closed_stops_nobody() -> None:
    bench, closed = Bench(), asyncio.new_event_loop()
    closed.close()
    bench.outbox.put(closed, lambda: None, urgent=True)
    assert bench.step("a", urgent=True) == ["a"]


@pytest.fixture
def handed(server: Running, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many texts each hand-over told of."""
    counts, outbox = list[int](), server.service.engine.outbox
    send = outbox.send

    def counted() -> None:
        full = sum(map(len, outbox._full.values()))
        send()
        if full and not outbox._full:
            counts.append(full)

    monkeypatch.setattr(outbox, "send", counted)
    return counts


@pytest.mark.parametrize("stream", [True, False])
def test_requests_wake_the_loop_seldom(server: Running, handed: list[int], stream: bool) -> None:
    """A stream at every step at most, an answer as a whole when a text of it has ended."""
    asked = {"model": server.model, "prompt": [1, 2, 3], "max_tokens": 40, "n": 4, "stream": stream, "temperature": 0}
    steps = server.service.models[server.model].scheduler.counts
    before = steps.steps
    with server.client() as client:
        answer = client.post("/v1/completions", json=asked | {"drafts": 0})
    assert len(handed) <= (steps.steps - before if stream else 4)
    if stream:
        lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
        assert lines.pop() == "[DONE]"
        chunks = [json.loads(line) for line in lines]
        head = {"id": chunks[0]["id"], "created": chunks[0]["created"], "model": server.model}
        assert all(head.items() <= chunk.items() for chunk in chunks)
        assert {chunk["choices"][0]["index"] for chunk in chunks} == {0, 1, 2, 3}
    else:
        assert answer.json()["usage"]["completion_tokens"] > 40


def test_tokens_of_an_answer_that_nobody_waited_for_count(server: Running) -> None:
    """They were written, though no news of them was told."""
    asked = {"model": server.model, "prompt": [7, 8, 9], "max_tokens": 250, "temperature": 0, "drafts": 0}
    body, accounts = json.dumps(asked), server.service.accounts
    counts = server.service.models[server.model].scheduler.counts
    before, written = accounts.tokens_today("bob"), counts.written_tokens
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
        client.sendall(
            f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {server.keys['bob']}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
        )
        deadline = time.monotonic() + 60
        while counts.written_tokens < written + 20 and time.monotonic() < deadline:
            time.sleep(0.001)
    while accounts.tokens_today("bob") == before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert 3 + 20 <= accounts.tokens_today("bob") - before <= 253
