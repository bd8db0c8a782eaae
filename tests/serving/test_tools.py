"""`python -m dsv3 accounts` and `serve`: what they print, refuse, and how they end."""

import io
import signal
import socket
import time
from pathlib import Path

import httpx
import pytest

from dsv3.serving.accounts import Accounts
from dsv3.serving.database import Database
from dsv3.tools import accounts, serve
from tests.commands import start
from tests.serving.running import PASSWORD, write_model


@pytest.fixture
def database(tmp_path: Path) -> str:
    return str(tmp_path / "accounts.sqlite")


def act(database: str, action: str, **options: object) -> dict[str, object]:
    return accounts.run(accounts.Options(action=action, database=database, **options))  # type: ignore[arg-type]


def test_an_account_from_its_beginning_to_its_end(
    database: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{PASSWORD}\nignored"))
    act(database, "add", name="ada")
    store = Accounts(Database(Path(database)))
    assert store.verify("ada", PASSWORD)
    key = str(act(database, "key", name="ada", label="laptop", days=1.0)["key"])
    printed = capsys.readouterr()
    assert printed.out.strip() == key
    assert store.owner_of_key(key) == "ada"
    assert act(database, "list")["accounts"][0]["keys"] == 1  # type: ignore[index]
    (listed,) = act(database, "keys", name="ada")["keys"]  # type: ignore[misc]
    assert key not in capsys.readouterr().out
    act(database, "revoke", name="ada", key=listed["id"])
    assert store.owner_of_key(key) is None
    act(database, "remove", name="ada")
    assert not store.exists("ada")
    events = [row["event"] for row in store.database.rows("SELECT event FROM audit ORDER BY time")]
    assert events == ["accounts add", "accounts key", "accounts revoke", "accounts remove"]


def test_the_password_is_asked_for_twice_at_a_terminal(database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    answers = iter([PASSWORD, "another one"])
    monkeypatch.setattr("getpass.getpass", lambda prompt: next(answers))
    with pytest.raises(ValueError, match="the two differ"):
        act(database, "add", name="ada")


@pytest.mark.parametrize(
    ("action", "options", "named"),
    [
        ("add", {}, "name"),
        ("remove", {"name": "nobody"}, "name=nobody"),
        ("password", {"name": "nobody"}, "name=nobody"),
        ("key", {"name": "nobody"}, "name=nobody"),
        ("revoke", {"name": "ada"}, "key"),
        ("revoke", {"name": "ada", "key": "' OR 1=1 --"}, "no such key"),
    ],
)
def test_mistakes_are_named(database: str, action: str, options: dict[str, object], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        act(database, action, **options)


def test_no_address_of_others_without_an_account(tmp_path: Path, database: str) -> None:
    checkpoint = str(write_model(tmp_path / "run"))
    with pytest.raises(ValueError, match=r"host=0.0.0.0: needs an account; add one with: python -m dsv3 accounts add"):
        serve.run(serve.Options(checkpoint=checkpoint, host="0.0.0.0", port=0, database=database, device="cpu"))


def test_a_port_in_use_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"port={port}: Address already in use"):
            serve.bound("127.0.0.1", port)


def test_a_server_from_its_link_to_its_end(tmp_path: Path) -> None:
    write_model(tmp_path / "run")
    command = start(tmp_path, "-m", "dsv3", "serve", "checkpoint=run", "port=0", "device=cpu")
    deadline = time.monotonic() + 100
    said = Path(command.output.name, "stderr")
    while not said.exists() or "Ctrl-C" not in said.read_text():
        assert command.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    entry = next(word for word in command.read("stderr").split() if word.startswith("http"))
    with httpx.Client(trust_env=False, timeout=60) as client:
        page = client.get(entry, follow_redirects=True)
        assert "<textarea" in page.text
        base = entry.partition("/enter")[0]
        assert client.get(f"{base}/api/me").json()["account"] == "local"
        asked = {"model": f"{tmp_path.name}/run", "prompt": "x", "max_tokens": 2}
        csrf = {"X-CSRF-Token": client.get(f"{base}/api/me").json()["csrf"]}
        assert client.post(f"{base}/v1/completions", json=asked, headers=csrf).is_success
        with client.stream(
            "POST", f"{base}/v1/completions", json=asked | {"max_tokens": 250, "stream": True}, headers=csrf
        ):
            command.send_signal(signal.SIGINT)
            output, errors = command.communicate()
    assert command.returncode in (0, 130)
    assert output == ""
    assert "Traceback" not in errors
