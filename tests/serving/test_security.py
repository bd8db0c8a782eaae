"""Nobody gets in without a session or a key, nobody reaches what is another's, and no foreign page acts for a user."""

import asyncio
import itertools
import json
import socket
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute
from starlette.routing import Mount

from dsv3.serving.accounts import Accounts
from dsv3.serving.app import build_application
from dsv3.serving.chat_server import ApiError
from dsv3.serving.database import Database
from dsv3.serving.gate import LARGEST_BODY, OPEN, Policy
from dsv3.serving.login_routes import Door
from dsv3.serving.throttle import Failures, Rate
from tests.serving.running import COOKIE, PASSWORD, Running

SECRET = "the launch code is 4711"


@pytest.fixture
def anyone(server: Running) -> Iterator[httpx.Client]:
    with server.client(None) as client:
        yield client


@pytest.fixture
def ada(server: Running) -> Iterator[httpx.Client]:
    with server.logged_in("ada") as client:
        yield client


@pytest.fixture
def bob(server: Running) -> Iterator[httpx.Client]:
    with server.logged_in("bob") as client:
        yield client


@pytest.fixture
def accounts(tmp_path: Path) -> Accounts:
    return Accounts(Database(tmp_path / "accounts.sqlite"))


def routes_of(server: Running) -> list[tuple[str, str]]:
    """Method and path of every route that the application has."""
    app = build_application(server.service, policy=Policy())
    found = [("GET", "/static/chat.js"), ("GET", "/static/../app.py"), ("GET", "/nowhere"), ("PROPFIND", "/")]
    pending: list[Any] = list(app.routes)
    while pending:
        route = pending.pop()
        pending += getattr(getattr(route, "original_router", None), "routes", [])
        if isinstance(route, APIRoute):
            path = route.path.replace("{name:path}", "one/seed1").replace("{id}", "x")
            found += [(method, path) for method in route.methods]
        assert not isinstance(route, Mount) or route.path == "/static"
    return found


def test_every_route_is_closed_but_the_log_in(server: Running, anyone: httpx.Client) -> None:
    routes = routes_of(server)
    assert {"/v1/chat/completions", "/v1/models", "/metrics", "/api/export", "/logout", "/health"} <= {
        p for _, p in routes
    }
    for key in (None, "Bearer wrong", "Basic YWRhOmFkYQ==", "Bearer " + "x" * 5000):
        headers = {"Authorization": key} if key else {}
        for method, path in routes:
            status = anyone.request(method, path, headers=headers).status_code
            if path in OPEN:
                assert status in (200, 303, 405, 422, 400), (method, path, status)
            elif path == "/" and method in ("GET", "HEAD"):
                assert status == 303
            else:
                assert status == 401, (method, path, status)
    assert anyone.get("/health").json() == {"status": "ok"}, "and it says nothing of models or accounts"


def test_paths_that_look_open_are_closed(anyone: httpx.Client) -> None:
    for path in (
        "/login/", "//health", "/health/../api/me", "/HEALTH", "/static/login.js/../chat.js", "/health;/api/me",
        "/login%2f..%2fapi%2fme", "/static/%2e%2e/gate.py", "/static//etc/passwd",
    ):  # fmt: skip
        answer = anyone.get(path)
        assert answer.status_code in (401, 404) or answer.headers["location"] == "/login", path


def test_what_is_anothers_is_out_of_reach(server: Running, ada: httpx.Client, bob: httpx.Client) -> None:
    made = {"title": SECRET, "content": {"turns": [{"user": SECRET, "answers": {}}]}}
    id = ada.post("/api/conversations", json=made).json()["id"]
    assert ada.get(f"/api/conversations/{id}").json()["content"] == made["content"]
    for answer in (
        bob.get(f"/api/conversations/{id}"),
        bob.put(f"/api/conversations/{id}", json=made | {"title": "mine"}),
        bob.delete(f"/api/conversations/{id}"),
    ):
        assert answer.status_code == 404
    assert SECRET not in bob.get("/api/conversations").text + bob.get("/api/export").text
    assert bob.delete("/api/conversations").json() == {"deleted": 0}
    assert SECRET in ada.get("/api/export").text
    with server.client("bob") as by_key:
        assert by_key.get(f"/api/conversations/{id}").status_code == 404
    key = server.service.accounts.keys("ada")[0]["id"]
    with pytest.raises(ValueError, match="no such key"):
        server.service.accounts.revoke("bob", str(key))
    assert ada.delete(f"/api/conversations/{id}").status_code == 200
    assert SECRET.encode() not in server.service.database.path.read_bytes(), "what is deleted is overwritten"


def test_the_cache_of_another_is_out_of_reach(server: Running) -> None:
    """A prompt that one account has just read is as cold for another; no field of a request changes that."""
    asked = {"model": server.model, "prompt": "private words " * 8, "max_tokens": 2, "user": "ada",
             "cache_salt": "ada", "owner": "ada", "account": "ada"}  # fmt: skip
    copied = []
    for account in ("ada", "ada", "bob"):
        with server.client(account) as client:
            usage = client.post("/v1/completions", json=asked).json()["usage"]
            copied.append(usage["prompt_tokens_details"]["cached_tokens"])
    assert copied[1] > 64
    assert copied[2] == 0


def test_foreign_pages_cannot_act_for_a_user(ada: httpx.Client) -> None:
    made = {"title": "x", "content": {}}
    url, good = "/api/conversations", ada.headers["X-CSRF-Token"]
    for headers in (
        {"X-CSRF-Token": ""},
        {"X-CSRF-Token": "wrong"},
        {"X-CSRF-Token": good, "Origin": "https://evil.example"},
        {"X-CSRF-Token": good, "Origin": "null"},
        {"X-CSRF-Token": good, "Sec-Fetch-Site": "cross-site"},
        {"X-CSRF-Token": good, "Sec-Fetch-Site": "same-site"},
    ):
        assert ada.post(url, json=made, headers=headers).status_code == 403
    forged = {"Origin": "https://evil.example"}
    assert ada.post("/login", json={"name": "ada", "password": PASSWORD}, headers=forged).status_code == 403
    assert ada.post("/logout", headers={"X-CSRF-Token": ""}).status_code == 403
    assert ada.post(url, json=made).status_code == 200


def test_other_sites_may_ask_only_where_they_are_named(server: Running) -> None:
    with server.client("ada") as client:
        named = client.get("/v1/models", headers={"Origin": "https://chat.example.org"})
        other = client.get("/v1/models", headers={"Origin": "https://evil.example"})
        assert named.headers["access-control-allow-origin"] == "https://chat.example.org"
        assert "access-control-allow-origin" not in other.headers
        assert "access-control-allow-credentials" not in named.headers
        asked = {"model": server.model, "prompt": "x", "max_tokens": 1}
        origin = {"Origin": "https://chat.example.org", "Sec-Fetch-Site": "cross-site"}
        assert client.post("/v1/completions", json=asked, headers=origin).status_code == 200, (
            "a key is not sent unasked"
        )


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "", "[::1", "a@b:c"]
)
def test_another_host_is_refused(server: Running, anyone: httpx.Client, host: str) -> None:
    for path in ("/", "/login", "/health", "/v1/models"):
        assert anyone.get(path, headers={"Host": host}).status_code in (400, 403)


def test_headers_of_every_answer(server: Running, ada: httpx.Client, anyone: httpx.Client) -> None:
    for answer in (ada.get("/"), ada.get("/static/chat.js"), anyone.get("/login"), anyone.get("/nowhere")):
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert answer.headers["cache-control"] == "no-store"
        assert "server" not in answer.headers


def test_bodies_are_limited(server: Running) -> None:
    def endless() -> Iterator[bytes]:
        for _ in range(LARGEST_BODY // 65_536 + 2):
            yield b" " * 65_536

    with server.client("ada") as client:
        json_type = {"Content-Type": "application/json"}
        assert client.post("/v1/completions", content=b" " * (LARGEST_BODY + 1), headers=json_type).status_code == 413
        assert client.post("/v1/completions", content=endless(), headers=json_type).status_code == 413
        for odd in (b"[" * 100_000, b"\xff\xfe", b"", b"null", b'{"model": "\\ud800", "prompt": "x"}'):
            assert client.post("/v1/completions", content=odd, headers=json_type).status_code in (400, 404)
        lone = {"model": server.model, "prompt": "\ud800", "max_tokens": 1}
        assert client.post("/v1/completions", content=json.dumps(lone), headers=json_type).status_code == 400
        nan = json.dumps({"model": server.model, "prompt": "x", "temperature": float("nan")})
        assert client.post("/v1/completions", content=nan, headers=json_type).status_code == 400
    assert server.service.engine.alive


def test_a_session_ends_with_log_out_and_a_new_password(server: Running, ada: httpx.Client) -> None:
    with server.logged_in("ada") as other:
        cookie = other.cookies[COOKIE]
        assert other.post("/logout").status_code == 200
        assert other.get("/api/me", headers={"Cookie": f"{COOKIE}={cookie}"}).status_code == 401, (
            "the server forgets it"
        )
    with server.logged_in("ada") as other:
        wrong = ada.post("/api/password", json={"old": "no", "new": "a new password"})
        assert wrong.status_code == 403
        assert ada.post("/api/password", json={"old": PASSWORD, "new": "short"}).status_code == 400
        assert ada.post("/api/password", json={"old": PASSWORD, "new": "a new password"}).status_code == 200
        assert other.get("/api/me").status_code == 401
        assert ada.get("/api/me").status_code == 200
    server.service.accounts.set_password("ada", PASSWORD)
    with server.client("ada") as by_key:
        assert by_key.post("/api/password", json={"old": PASSWORD, "new": "a new password"}).status_code == 403


def test_the_cookie_is_for_this_site_and_no_script(server: Running, anyone: httpx.Client) -> None:
    sent = anyone.post("/login", json={"name": "bob", "password": PASSWORD}).headers["set-cookie"]
    assert "HttpOnly" in sent
    assert "SameSite=strict" in sent
    assert "Secure" not in sent, "this server speaks HTTP; behind a TLS proxy: Policy(secure=True)"


def test_wrong_passwords_are_slowed_down() -> None:
    class Clock:
        now = 100.0

        def __call__(self) -> float:
            return self.now

    clock = Clock()
    failures = Failures(free=5, clock=clock)
    waits = []
    for _ in range(15):
        waits.append(failures.wait("ada"))
        clock.now += waits[-1]
        failures.begin("ada")
    assert waits[:5] == [0] * 5
    assert all(later >= 2 * earlier - 2 for earlier, later in itertools.pairwise(waits) if later < 900)
    assert max(waits) >= 900
    assert failures.wait("bob") == 0
    clock.now += 1000
    assert failures.wait("ada") == 0
    rate = Rate(60, clock)
    assert [rate.wait("ada") for _ in range(61)] == [0] * 60 + [2]
    clock.now += 1.5
    assert rate.wait("ada") == 0


def test_guesses_in_parallel_are_no_way_around(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """And an account of one's own buys no further guesses."""
    monkeypatch.setattr(server.service.accounts, "verify", lambda name, password: password == PASSWORD)

    async def guess() -> None:
        door = Door(server.service, None)
        guesses = [door.verify("ada", "guess", "10.0.0.1") for _ in range(30)]
        found = await asyncio.gather(*guesses, return_exceptions=True)
        assert sum(answer is False for answer in found) <= 5
        assert all(answer is False or (isinstance(answer, ApiError) and answer.status == 429) for answer in found)
        for _ in range(15):
            await door.verify("bob", PASSWORD, "10.0.0.1")
        with pytest.raises(ApiError, match="too many failed"):
            await door.verify("bob", PASSWORD, "10.0.0.1")
        assert await door.verify("ada", PASSWORD, "10.0.0.2"), "others may still log in"

    asyncio.run(guess())


def test_what_the_database_holds(accounts: Accounts) -> None:
    accounts.add("ada", PASSWORD)
    key, token = accounts.new_key("ada", "laptop", 1.0), accounts.new_session("ada")
    accounts.note("log-in failed", account="ada", address="10.0.0.1")
    path = accounts.database.path
    accounts.database.close()
    content = b"".join(file.read_bytes() for file in path.parent.iterdir())
    for secret in (PASSWORD, key, key.removeprefix("dsv3-"), token):
        assert secret.encode() not in content
    assert b"$argon2id$" in content
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_keys_expire_and_are_revoked(accounts: Accounts) -> None:
    now = [1e9]
    accounts.clock = lambda: now[0]
    accounts.add("ada", PASSWORD)
    key, short = accounts.new_key("ada", "", None), accounts.new_key("ada", "", 1.0)
    assert accounts.owner_of_key(key) == accounts.owner_of_key(short) == "ada"
    assert accounts.owner_of_key(key[:-1]) is accounts.owner_of_key("") is accounts.owner_of_key("\ud800") is None
    now[0] += 86_401
    assert accounts.owner_of_key(short) is None
    accounts.revoke("ada", str(accounts.keys("ada")[0]["id"]))
    assert accounts.owner_of_key(key) is None
    session = accounts.new_session("ada")
    now[0] += 8 * 86_400
    assert accounts.session(session) is None
    key = accounts.new_key("ada", "", None)
    accounts.remove("ada")
    assert accounts.owner_of_key(key) is None


@pytest.mark.parametrize("name", ["", "Ada", "a b", "../x", "a" * 41, "-a", "ä", "a\n", "<b>"])
def test_odd_names_are_refused(accounts: Accounts, name: str) -> None:
    with pytest.raises(ValueError, match="name="):
        accounts.add(name, PASSWORD)


def test_an_account_without_a_password_has_none(accounts: Accounts) -> None:
    accounts.add("local", None)
    assert not any(accounts.verify("local", guess) for guess in ("", "\ud800" * 10_000))
    with pytest.raises(ValueError, match="password"):
        accounts.add("ada", "short")


def test_the_audit_log_knows_no_prompts(server: Running) -> None:
    with server.client("ada") as client:
        assert client.post(
            "/v1/completions", json={"model": server.model, "prompt": SECRET, "max_tokens": 1}
        ).is_success
        client.post("/login", json={"name": "ada", "password": SECRET})
    rows = server.service.database.rows("SELECT * FROM audit")
    events = {row["event"] for row in rows}
    assert {"completion", "log-in failed"} <= events
    assert not any("launch" in str(tuple(row)) for row in rows)


def test_limits_of_an_account(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"model": server.model, "prompt": "x", "max_tokens": 1}
    with server.client("bob") as client:
        used = server.service.accounts.tokens_today("bob")
        assert client.post("/v1/completions", json=asked).is_success
        assert server.service.accounts.tokens_today("bob") == used + 3
        monkeypatch.setattr(server.service.quota, "tokens_per_day", used + 1)
        spent = client.post("/v1/completions", json=asked)
        monkeypatch.setattr(server.service.quota, "tokens_per_day", 0)
        monkeypatch.setattr(server.service, "rate", Rate(1))
        assert client.post("/v1/completions", json=asked).is_success
        fast = client.post("/v1/completions", json=asked)
    for refused in (spent, fast):
        assert refused.status_code == 429
        assert 0 < int(refused.headers["retry-after"]) <= 86_401
        assert refused.json()["error"]["type"] == "rate_limit_error"


def test_the_health_of_a_dead_engine(server: Running, anyone: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.service.engine, "failure", MemoryError())
    assert anyone.get("/health").status_code == 503
    with server.client("ada") as client:
        refused = client.post("/v1/completions", json={"model": server.model, "prompt": "x"})
    assert refused.status_code == 503
    assert "Traceback" not in refused.text


def test_half_a_request_and_noise_stop_nobody(server: Running, anyone: httpx.Client) -> None:
    port = int(server.url.rpartition(":")[2])
    for noise in (
        b"\x00" * 4096,
        b"GET / HTTP/1.1\r\n",
        b"GET /" + b"a" * 100_000,
        b"POST /login HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
    ):
        with socket.socket() as raw:
            raw.connect(("127.0.0.1", port))
            raw.sendall(noise)
    assert anyone.get("/health").status_code == 200


def test_a_file_that_is_no_database_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.sqlite"
    file.write_bytes(b"no database, " * 100)
    with pytest.raises(ValueError, match="not a database of this server"):
        Database(file)
    assert file.read_bytes().startswith(b"no database")
