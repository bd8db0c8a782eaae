"""Streams: no character is split, no stop string leaks, and who goes away or reads slowly holds up nobody."""

import asyncio
import json
import random
import socket
import threading
import time
from typing import Any

import httpx
import pytest

from dsv3.inference.sampling import Greedy
from tests.serving.running import Running

SMILE = "é漢🙂"


def lines_of(content: str) -> list[Any]:
    data = [line.removeprefix("data: ") for line in content.splitlines() if line]
    assert data[-1] == "[DONE]"
    return [json.loads(line) for line in data[:-1]]


def wait_until_idle(server: Running) -> None:
    """Fails where the engines do nothing for half a minute, however slow they are."""
    schedulers = [served.scheduler for served in server.service.models.values()]
    steps, deadline = -1, 0.0
    while any(scheduler.running or scheduler.waiting for scheduler in schedulers):
        if (now := sum(scheduler.counts.steps for scheduler in schedulers)) != steps:
            steps, deadline = now, time.monotonic() + 30
        assert time.monotonic() < deadline, "a text still runs"
        time.sleep(0.02)


def write_always(
    server: Running, text: str, monkeypatch: pytest.MonkeyPatch, end: threading.Event | None = None
) -> None:
    """Let every text be this one, byte by byte, whatever the model says. Its last byte waits for `end`."""
    tokenizer = server.service.models[server.model].model.tokenizer
    script = [tokenizer.encode_bytes(bytes([byte]))[0] for byte in text.encode()] + [tokenizer.eos]

    class Scripted(Greedy):
        def __init__(self) -> None:
            self.left = list(script)

        def verify(self, logits_SV: Any, drafts: Any) -> tuple[int, int]:
            if end is not None and len(self.left) == 2:
                end.wait(60)
            return 0, self.left.pop(0)

    monkeypatch.setattr("dsv3.serving.answers_stream.choice_of", lambda settings: Scripted())


@pytest.mark.parametrize("most", range(1, 11))
def test_no_character_is_split(server: Running, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Every token is a byte. A text that is cut within a character ends with one replacement character."""
    write_always(server, SMILE, monkeypatch)
    asked = {"model": server.model, "prompt": "x", "max_tokens": most, "stream": True, "drafts": 0}
    with server.client() as client:
        streamed = client.post("/v1/completions", json=asked)
        whole = client.post("/v1/completions", json=asked | {"stream": False}).json()
    assert streamed.headers["content-type"].startswith("text/event-stream")
    pieces = [line["choices"][0]["text"] for line in lines_of(streamed.text)]
    expected = SMILE.encode()[:most].decode(errors="replace")
    assert "".join(pieces) == whole["choices"][0]["text"] == expected
    assert not any("\ufffd" in piece for piece in pieces[:-1])


@pytest.mark.parametrize(
    ("text", "stops", "shown", "finish"),
    [
        ("one END two", ["END"], "one ", "stop"),
        ("one EN two", ["END"], "one EN two", "stop"),
        ("a🙂b", ["🙂"], "a", "stop"),
        ("aabab", ["abab"], "a", "stop"),
        ("one END", ["ENDING"], "one END", "stop"),
    ],
)
def test_stop_strings_never_leak(
    server: Running, monkeypatch: pytest.MonkeyPatch, text: str, stops: list[str], shown: str, finish: str
) -> None:
    write_always(server, text, monkeypatch)
    asked = {"model": server.model, "prompt": "END", "max_tokens": 40, "stop": stops, "stream": True, "drafts": 0}
    with server.client() as client:
        lines = lines_of(client.post("/v1/completions", json=asked).text)
    assert "".join(line["choices"][0]["text"] for line in lines) == shown
    assert lines[-1]["choices"][0]["finish_reason"] == finish


def test_who_goes_away_leaves_nothing(server: Running) -> None:
    """100 connections that break at a random moment, streamed or not, next to one that reads to the end."""
    draw = random.Random(1)
    served = server.service.models[server.model]
    before = dict(served.scheduler.counts.ends)

    async def ask_and_go(client: httpx.AsyncClient, stream: bool, seconds: float) -> None:
        asked = {"model": server.model, "prompt": "x" * 9, "max_tokens": 200, "stream": stream, "n": 2, "seed": 1}
        try:
            async with asyncio.timeout(seconds), client.stream("POST", "/v1/completions", json=asked) as response:
                async for _ in response.aiter_lines():
                    pass
        except TimeoutError:
            pass

    async def all_of_them() -> None:
        headers = {"Authorization": f"Bearer {server.keys['bob']}"}
        async with httpx.AsyncClient(base_url=server.url, headers=headers, trust_env=False, timeout=60) as client:
            for _ in range(10):
                asks = [ask_and_go(client, draw.random() < 0.5, draw.random() / 5) for _ in range(10)]
                await asyncio.gather(*asks)

    asyncio.run(all_of_them())
    wait_until_idle(server)
    ends = served.scheduler.counts.ends
    assert ends["cancelled"] - before.get("cancelled", 0) > 100
    engine = served.scheduler.engine
    assert not engine.rows
    assert set(served.backend.backend.caches.lengths) == set(engine.kept.rows)  # type: ignore[attr-defined]
    assert server.service.engine.alive


def test_who_reads_slowly_holds_up_nobody(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that reads nothing of a long answer until all else is done, and one that sends half a request."""
    write_always(server, "always as long, whatever is drawn. " * 2, monkeypatch)
    asked = {"model": server.model, "prompt": "x", "max_tokens": 70, "stream": True, "logprobs": 16, "n": 8}
    body = json.dumps(asked | {"drafts": 0})
    port = int(server.url.rpartition(":")[2])
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAuthorization: Bearer {server.keys['bob']}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.socket() as deaf, socket.socket() as half:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        deaf.connect(("127.0.0.1", port))
        deaf.sendall((head + body).encode())
        half.connect(("127.0.0.1", port))
        half.sendall(head[:60].encode())
        with server.client() as client:
            for _ in range(3):
                short = {"model": server.model, "prompt": "y", "max_tokens": 5, "drafts": 0}
                assert client.post("/v1/completions", json=short).status_code == 200
        wait_until_idle(server)  # what the deaf one asked for is written, and waits for it alone
        with server.client() as client:
            assert client.get("/v1/models").status_code == 200
        deaf.settimeout(60)
        read = b""
        while b"[DONE]" not in read[-100:]:
            more = deaf.recv(2**16)
            assert more
            read += more
        assert len(read) > 2**17 + 2**16, "more than the socket and the server keep for it"
