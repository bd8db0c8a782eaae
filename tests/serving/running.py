"""A server in a thread of this process, over a tiny model with random weights."""

import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import uvicorn

from dsv3.evaluation.benchmarks.models import NativeModel
from dsv3.model.decoder import Decoder
from dsv3.serving.accounts import LOCAL
from dsv3.serving.app import build_application
from dsv3.serving.chat_server import Service
from dsv3.serving.database import Database
from dsv3.serving.gate import Policy
from dsv3.tools.serve import Options, open_service
from tests.parity.runs import VOCABULARY, write_run
from tests.parity.test_decoder import SHAPES
from tests.parity.twins import configured, random_model

PASSWORD = "correct horse battery"
COOKIE = "dsv3-session-test"


@dataclass
class Running:
    """`keys`: an API key of each account."""

    url: str
    service: Service
    token: str
    keys: dict[str, str]

    def client(self, account: str | None = "ada", **settings: Any) -> httpx.Client:
        headers = {"Authorization": f"Bearer {self.keys[account]}"} if account else {}
        return httpx.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False, **settings)

    def logged_in(self, account: str) -> httpx.Client:
        """In a session. A password would take a tenth of a second."""
        client = self.client(None)
        token = self.service.accounts.new_session(account)
        session = self.service.accounts.session(token)
        assert session is not None
        client.cookies.set(COOKIE, token, domain="127.0.0.1")
        client.headers["X-CSRF-Token"] = session.csrf
        return client

    @property
    def model(self) -> str:
        return next(iter(self.service.models))

    @property
    def decoder(self) -> Decoder:
        backend: Any = self.service.models[self.model].backend
        decoder: Decoder = backend.backend.model
        return decoder

    def scored(self) -> NativeModel:
        """The model in this process, for log-probabilities."""
        model: Any = self.service.models[self.model].model
        return NativeModel(self.decoder, model.tokenizer, name="own", max_length=model.max_length)


def write_model(folder: Path, *, seed: int = 1, length: int = 256, **shapes: int) -> Path:
    config = configured("precision=fp32", **SHAPES | {"vocab_size": VOCABULARY} | shapes)
    config.data.sequence_length = length
    folder.parent.mkdir(parents=True, exist_ok=True)
    return write_run(folder, config, random_model(config, seed=seed))


@contextmanager
def running(
    folder: Path, *, compare: bool = False, shapes: Mapping[str, int] | None = None, **options: Any
) -> Iterator[Running]:
    """Of the accounts `ada` and `bob`. `options`: of `python -m dsv3 serve`, by default with engine=eager."""
    options = {"engine": "eager", **options}
    checkpoint = str(write_model(folder / "one" / "seed1", **shapes or {}))
    other = str(write_model(folder / "two" / "seed1", seed=2)) if compare else None
    database = Database(folder / "accounts.sqlite")
    service = open_service(Options(checkpoint=checkpoint, compare=other, device="cpu", **options), database)
    service.accounts.add(LOCAL, None)
    keys = {}
    for account in ("ada", "bob"):
        service.accounts.add(account, PASSWORD)
        keys[account] = service.accounts.new_key(account, "tests", None)
    app = build_application(service, policy=Policy(cookie=COOKIE), token="once", origins=["https://chat.example.org"])
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**16)  # soon full where a client does not read
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", server_header=False, timeout_graceful_shutdown=2))
    service.start()
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield Running(f"http://127.0.0.1:{listening.getsockname()[1]}", service, "once", keys)
    finally:
        server.should_exit = True
        thread.join(20)
        service.close()
