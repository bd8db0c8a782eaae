"""vLLM behind the server, with a stand-in for its process; `test_vllm_itself.py` has the real one."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dsv3.serving import vllm_process
from dsv3.serving.vllm_engine import VLLMEngine
from tests.serving import fake_vllm
from tests.serving.running import Running, running

PUBLISHED = {"n_groups": 1, "topk_groups": 1}
"""Shapes that Hugging Face's format can hold."""


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("environment")
    (folder / "bin").mkdir()
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} {fake_vllm.__file__} "$@"\n')
    python.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vllm_process, "ENVIRONMENT", folder)
        yield folder


@pytest.fixture(scope="module")
def server(environment: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(
        tmp_path_factory.mktemp("vllm"), engine="vllm", shapes=PUBLISHED, requests_per_minute=100_000
    ) as server:
        yield server


def engine_of(server: Running) -> VLLMEngine:
    engine: Any = server.service.models[server.model].scheduler.engine
    return engine


def asked(server: Running) -> list[Any]:
    """Nothing before the first request: this may be the first test that an interpreter runs of this file."""
    path = engine_of(server).process.folder / "asked.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def within(seconds: float, holds: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()


def test_texts_are_those_of_its_tokens(server: Running) -> None:
    tokenizer = server.service.models[server.model].model.tokenizer
    request = {"model": server.model, "prompt": [10, 20], "max_tokens": 5, "temperature": 0}
    with server.client() as client:
        whole = client.post("/v1/completions", json=request).json()
        assert whole["choices"][0]["text"] == tokenizer.decode(range(21, 26))
        assert whole["choices"][0]["finish_reason"] == "length"
        assert whole["usage"]["completion_tokens"] == 5
        end = client.post("/v1/completions", json=request | {"max_tokens": 99}).json()["choices"][0]
        assert (end["text"], end["finish_reason"]) == (tokenizer.decode(range(21, 50)), "stop")
        stop = tokenizer.decode([23])
        stopped = client.post("/v1/completions", json=request | {"max_tokens": 99, "stop": stop}).json()["choices"][0]
        assert (stopped["text"], stopped["finish_reason"]) == (tokenizer.decode([21, 22]), "stop")
        streamed = client.post("/v1/completions", json=request | {"stream": True}).text
    lines = [json.loads(line[6:]) for line in streamed.splitlines() if line.startswith("data: {")]
    assert "".join(line["choices"][0]["text"] for line in lines) == whole["choices"][0]["text"]


def test_accounts_share_no_cache(server: Running) -> None:
    before = len(asked(server))
    for account in ("ada", "bob", "ada"):
        with server.client(account) as client:
            chat = {"model": server.model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
            assert client.post("/v1/chat/completions", json=chat).is_success
    salts = [one["cache_salt"] for one in asked(server)[before:]]
    assert salts[0] == salts[2] != salts[1]


def test_who_goes_away_ends_the_text(server: Running) -> None:
    request = {"model": server.model, "prompt": [1], "max_tokens": 45, "stream": True}
    before = asked(server).count("broken off")
    with server.client() as client, client.stream("POST", "/v1/completions", json=request) as response:
        next(response.iter_lines())
    assert within(10, lambda: asked(server).count("broken off") > before)
    assert within(10, lambda: not engine_of(server).rows)


def test_what_it_cannot_is_refused_by_name(server: Running) -> None:
    request = {"model": server.model, "prompt": "x", "max_tokens": 3}
    with server.client() as client:
        for field in ({"logprobs": 2}, {"response_format": {"type": "json_object"}}):
            refused = client.post("/v1/completions", json=request | field)
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == next(iter(field))
        broken = client.post("/v1/completions", json=request | {"prompt": [fake_vllm.REFUSED]})
        assert broken.status_code == 503
        assert client.get("/health").status_code == 200, "one text that failed is not the end"
        assert "dsv3_running_texts" in client.get("/metrics").text


def test_its_socket_is_this_users_alone(server: Running) -> None:
    assert engine_of(server).process.folder.stat().st_mode & 0o077 == 0


def test_a_start_that_fails_says_why_and_leaves_nothing(
    environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    server = running(tmp_path, engine="vllm", shapes=PUBLISHED, vllm=["--die"])
    with pytest.raises(RuntimeError, match="vLLM has ended with status 1: ValueError: no such model"), server:
        pass
    with pytest.raises(ValueError, match="cannot hold this model"), running(tmp_path / "other", engine="vllm"):
        pass
    assert not list((tmp_path / "temporary").iterdir())


def test_without_an_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_process, "ENVIRONMENT", tmp_path / ".vllm")
    server = running(tmp_path, engine="vllm", shapes=PUBLISHED)
    with pytest.raises(ValueError, match=r"engine=vllm: .* holds no vLLM; set it up with: make vllm"), server:
        pass


def test_its_death_is_the_engines(server: Running) -> None:
    """The last test: the server does not answer after it."""
    process = engine_of(server).process
    process.process.kill()
    with server.client() as client:
        assert within(10, lambda: client.get("/health").status_code == 503)
        assert client.post("/v1/completions", json={"model": server.model, "prompt": "x"}).status_code == 503
    server.service.close()
    assert process.process.returncode is not None
    assert not process.folder.exists()
