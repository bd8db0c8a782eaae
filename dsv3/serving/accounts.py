"""Accounts, their passwords, API keys and sessions, and the audit log.

Passwords are kept as argon2id hashes; API keys and session tokens, which are random, as SHA-256.
"""

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable
from typing import NamedTuple

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from dsv3.serving.database import Database

LOCAL = "local"
"""The account of whoever has the one-time token; it has no password."""
NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")
SHORTEST_PASSWORD, LONGEST_PASSWORD = 10, 1000
SESSION_SECONDS = 7 * 86_400.0
KEY_PREFIX = "dsv3-"
AUDIT_DAYS = 90


class Session(NamedTuple):
    """Who is logged in, and the token that a change must carry."""

    account: str
    csrf: str


class Accounts:
    """What the database says of accounts. `clock`: seconds since 1970."""

    def __init__(self, database: Database, clock: Callable[[], float] = time.time) -> None:
        self.database, self.clock = database, clock
        self._hasher = PasswordHasher()  # argon2id, 64 MiB, 3 passes
        self._nobody = self._hasher.hash(secrets.token_hex())  # checked where there is no such account: equal time
        database.change("DELETE FROM audit WHERE time < ?", clock() - AUDIT_DAYS * 86_400)
        database.change("DELETE FROM sessions WHERE expires < ?", clock())

    def add(self, name: str, password: str | None) -> None:
        """Raises ValueError: the name is taken or malformed, or the password too short or too long."""
        if not NAME.fullmatch(name):
            raise ValueError(
                f"name={name}: must be 1 to 40 of a-z, 0-9, '.', '_' and '-', beginning with a letter or digit"
            )
        hashed = None if password is None else self._hash(password)
        if self.exists(name):
            raise ValueError(f"name={name}: there is such an account already")
        self.database.change("INSERT INTO accounts VALUES (?, ?, ?)", name, hashed, self.clock())

    def exists(self, name: str) -> bool:
        return self.database.row("SELECT 1 FROM accounts WHERE name = ?", name) is not None

    def have_passwords(self) -> bool:
        return self.database.row("SELECT 1 FROM accounts WHERE password IS NOT NULL") is not None

    def listed(self) -> list[dict[str, object]]:
        query = """SELECT name, created, password IS NOT NULL AS password,
            (SELECT count(*) FROM keys WHERE account = name) AS keys,
            (SELECT coalesce(sum(tokens), 0) FROM usage WHERE account = name) AS tokens FROM accounts ORDER BY name"""
        return [dict(row) for row in self.database.rows(query)]

    def remove(self, name: str) -> None:
        """With its keys, sessions, conversations and usage. Raises ValueError where there is no such account."""
        if not self.database.change("DELETE FROM accounts WHERE name = ?", name):
            raise ValueError(f"name={name}: there is no such account")

    def _hash(self, password: str) -> str:
        if not SHORTEST_PASSWORD <= len(password) <= LONGEST_PASSWORD:
            raise ValueError(f"password: must have {SHORTEST_PASSWORD} to {LONGEST_PASSWORD:,} characters")
        return self._hasher.hash(bytes_of(password))

    def verify(self, name: str, password: str) -> bool:
        """Takes as long for a name that is unknown. About 50 ms and 64 MiB."""
        row = self.database.row("SELECT password FROM accounts WHERE name = ?", name)
        known = row["password"] if row is not None else None
        try:
            right = self._hasher.verify(known or self._nobody, bytes_of(password[: LONGEST_PASSWORD + 1]))
        except (VerificationError, InvalidHashError):
            return False
        return right and known is not None

    def set_password(self, name: str, password: str) -> None:
        """Ends all sessions of the account. Raises ValueError as `add` does."""
        hashed = self._hash(password)
        with self.database.together():
            self.database.change("UPDATE accounts SET password = ? WHERE name = ?", hashed, name)
            self.database.change("DELETE FROM sessions WHERE account = ?", name)

    def new_session(self, name: str) -> str:
        """The token for the cookie."""
        token = secrets.token_urlsafe(32)
        csrf, expires = secrets.token_urlsafe(32), self.clock() + SESSION_SECONDS
        self.database.change("INSERT INTO sessions VALUES (?, ?, ?, ?)", hash_of(token), name, csrf, expires)
        return token

    def session(self, token: str) -> Session | None:
        row = self.database.row("SELECT * FROM sessions WHERE hash = ?", hash_of(token))
        if row is None or row["expires"] < self.clock() or not hmac.compare_digest(row["hash"], hash_of(token)):
            return None
        return Session(row["account"], row["csrf"])

    def end_session(self, token: str) -> None:
        self.database.change("DELETE FROM sessions WHERE hash = ?", hash_of(token))

    def new_key(self, name: str, label: str, days: float | None) -> str:
        """The key, which is shown once. Raises ValueError where there is no such account."""
        if not self.exists(name):
            raise ValueError(f"name={name}: there is no such account")
        key = KEY_PREFIX + secrets.token_urlsafe(32)
        now = self.clock()
        expires = None if days is None else now + days * 86_400
        self.database.change("INSERT INTO keys VALUES (?, ?, ?, ?, ?)", hash_of(key), name, label[:80], now, expires)
        return key

    def keys(self, name: str) -> list[dict[str, object]]:
        """Each key by the first 8 hexadecimal digits of its hash."""
        query = """SELECT lower(substr(hex(hash), 1, 8)) AS id, label, created, expires FROM keys
            WHERE account = ? ORDER BY created"""
        return [dict(row) for row in self.database.rows(query, name)]

    def revoke(self, name: str, key: str) -> None:
        """`key`: its id. Raises ValueError where the account has no such key."""
        query = "DELETE FROM keys WHERE account = ? AND lower(substr(hex(hash), 1, 8)) = ?"
        if not self.database.change(query, name, key):
            raise ValueError(f"key {key}: account {name} has no such key")

    def owner_of_key(self, key: str) -> str | None:
        """The account of an API key that has not expired."""
        row = self.database.row("SELECT * FROM keys WHERE hash = ?", hash_of(key))
        if row is None or not hmac.compare_digest(row["hash"], hash_of(key)):
            return None
        return None if row["expires"] is not None and row["expires"] < self.clock() else str(row["account"])

    def note(self, event: str, *, account: str, address: str = "", detail: str = "") -> None:
        """An entry of the audit log. `detail`: no text of a user's."""
        values = (self.clock(), account[:40], address, event, detail)
        self.database.change("INSERT INTO audit VALUES (?, ?, ?, ?, ?)", *values)

    def count_tokens(self, account: str, tokens: int) -> None:
        query = """INSERT INTO usage SELECT name, ?, ? FROM accounts WHERE name = ?
            ON CONFLICT (account, day) DO UPDATE SET tokens = tokens + excluded.tokens"""
        self.database.change(query, self._day(), tokens, account)

    def tokens_today(self, account: str) -> int:
        row = self.database.row("SELECT tokens FROM usage WHERE account = ? AND day = ?", account, self._day())
        return 0 if row is None else int(row["tokens"])

    def seconds_of_day_left(self) -> int:
        return int(86_400 - self.clock() % 86_400) + 1

    def _day(self) -> int:
        return int(self.clock() // 86_400)


def hash_of(secret: str) -> bytes:
    return hashlib.sha256(bytes_of(secret)).digest()


def bytes_of(text: str) -> bytes:
    """Of any string, Unicode or not."""
    return text.encode(errors="surrogatepass")
