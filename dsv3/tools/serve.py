"""Serve a trained model: web chat and an OpenAI-compatible API, with a log-in."""

import gc
import secrets
import signal
import socket
import sys
import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from dsv3.bounds import Between, NonNegativeInt, PositiveFloat, PositiveInt
from dsv3.cli import ENGINE_HELP, ENGINES, REQUIRED, option

if TYPE_CHECKING:
    from dsv3.serving.chat_server import Service
    from dsv3.serving.database import Database

LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass
class Options:
    checkpoint: str = option(
        REQUIRED, "a run folder, one of its checkpoint files, a Hugging Face checkpoint, or an export by format=onnx"
    )
    compare: str | None = option(None, "a second model, which the page shows side by side")
    port: Annotated[int, Between(0, 65535)] = option(8060, "port; 0: any free port")
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0: all of this machine's, which needs an account")
    database: str = option("runs/accounts.sqlite", "file of accounts and conversations")
    engine: str = option("auto", f"{ENGINE_HELP}; vllm: a vLLM process (make vllm)", choices=(*ENGINES, "vllm"))
    vllm: list[str] = option([], "with engine=vllm: further flags of vLLM's server, such as [--enforce-eager]")
    weights: str = option("live", "live (current), or ema (exponential moving average)", choices=("live", "ema"))
    hosts: list[str] = option([], "further names under which browsers may ask, such as [gpu1.example.org]")
    origins: list[str] = option([], "sites whose pages may use the API with a key: [https://chat.example.org]")
    tls_proxy: bool = option(False, "a proxy in front speaks HTTPS: cookies are Secure, addresses are the proxy's word")
    slots: PositiveInt = option(16, "texts written at once")
    account_slots: PositiveInt = option(8, "of these, one account's")
    waiting: PositiveInt = option(256, "texts that may wait; more are refused with 429")
    account_waiting: PositiveInt = option(64, "of these, one account's")
    requests_per_minute: PositiveInt = option(600, "of one account")
    tokens_per_day: NonNegativeInt = option(0, "read and written, of one account; 0: no limit")
    timeout: PositiveFloat = option(600.0, "seconds after which a text is ended")
    drafts: NonNegativeInt | None = option(
        None, "tokens that MTP drafts for each pass; 0: none; null: 1 as long as drafts make the text faster"
    )
    prefill: PositiveInt = option(
        12, "prompt tokens read in one step next to texts being written; more: sooner read, slower texts"
    )
    cache_mib: NonNegativeInt = option(256, "memory for finished texts whose beginnings are reused, MiB per model")
    threads: PositiveInt = option(1, "CPU threads of the engine")
    open: bool = option(False, "open the page in this machine's browser")
    allow: list[str] = option([], "classes outside conf/ that the run's config.yaml may name: [package.Class]")
    device: str = option("auto", "auto: cuda where torch sees a GPU, else cpu", choices=("auto", "cpu", "cuda"))


def run(options: Options) -> dict[str, Any]:
    """Serve until Ctrl-C.

    Raises:
        ValueError: host= is not loopback and there is no account; a key is out of its range.
        FileNotFoundError: `checkpoint` or `compare` is no model's. RuntimeError: vLLM does not start.
    """
    import torch

    from dsv3.serving.accounts import LOCAL, Accounts
    from dsv3.serving.database import Database

    torch.set_num_threads(options.threads)
    listening = bound(options.host, options.port)
    is_local = options.host in LOOPBACK
    accounts = Accounts(Database(Path(options.database)))
    if not is_local and not accounts.have_passwords():
        raise ValueError(
            f"host={options.host}: needs an account; add one with: "
            f"python -m dsv3 accounts add name=NAME database={options.database}"
        )
    if is_local and not accounts.exists(LOCAL):
        accounts.add(LOCAL, None)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # it ends what was started, as Ctrl-C does
    service = open_service(options, accounts.database)
    try:
        return {"url": answer(service, options, listening)}
    finally:
        service.close()


def answer(service: "Service", options: Options, listening: socket.socket) -> str:
    """Serve until Ctrl-C; the address."""
    import uvicorn

    from dsv3.serving.app import build_application
    from dsv3.serving.gate import Policy

    port = listening.getsockname()[1]
    token = secrets.token_urlsafe(32) if options.host in LOOPBACK else None
    policy = Policy(hosts=options.hosts, cookie=f"dsv3-session-{port}", secure=options.tls_proxy)
    app = build_application(service, policy=policy, token=token, origins=options.origins)
    address = f"[{options.host}]" if ":" in options.host else options.host
    url = f"http://{address}:{port}"
    entry = f"{url}/enter?token={token}" if token else f"{url}/login"
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        proxy_headers=options.tls_proxy,
        timeout_graceful_shutdown=5,
        limit_concurrency=1000,
    )
    gc.collect()
    gc.freeze()  # so that garbage of requests is looked for among what requests made
    print(f"{', '.join(service.models)} at {entry}   (Ctrl-C to quit)", file=sys.stderr, flush=True)
    service.start()
    if options.open:
        webbrowser.open(entry)  # the socket listens already: what is asked now is answered soon
    uvicorn.Server(config).run([listening])
    return url


def bound(host: str, port: int) -> socket.socket:
    """Raises ValueError where the address is in use or no address of this machine."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise ValueError(f"host={host} port={port}: {error.strerror or error}") from None
    return listening


def open_service(options: Options, database: "Database") -> "Service":
    """Models, opened."""
    from dsv3.serving.chat_server import Quota, Service
    from dsv3.serving.engine_thread import EngineThread
    from dsv3.serving.scheduler import Limits
    from dsv3.serving.served_model import ModelSettings, Served, name_of, open_model
    from dsv3.serving.vllm_model import open_vllm

    settings = ModelSettings(
        engine=options.engine,
        weights=options.weights,
        device=options.device,
        allow=options.allow,
        drafts=options.drafts,
        prefill=options.prefill,
        cache_bytes=options.cache_mib * 2**20,
    )
    limits = Limits(options.slots, options.account_slots, options.waiting, options.account_waiting)
    engine = EngineThread()
    checkpoints = [options.checkpoint, *([options.compare] if options.compare else [])]
    if len({name_of(checkpoint) for checkpoint in checkpoints}) < len(checkpoints):
        raise ValueError(f"compare={options.compare}: has the same name as checkpoint=; rename its folder")
    if options.vllm and options.engine != "vllm":
        raise ValueError(f"vllm={options.vllm}: is for engine=vllm")
    models: list[Served] = []
    try:
        for checkpoint in checkpoints:
            if options.engine == "vllm":
                models.append(open_vllm(checkpoint, settings, limits, engine.wake, options.vllm))
            else:
                models.append(open_model(checkpoint, settings, limits, engine.wake))
    except BaseException:
        for served in models:
            served.close()
        raise
    by_name = {served.name: served for served in models}
    quota = Quota(options.requests_per_minute, options.tokens_per_day)
    return Service(by_name, database, engine, quota, seconds=options.timeout)
