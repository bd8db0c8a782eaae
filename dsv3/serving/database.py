"""The server's SQLite database: one file that only its owner may read."""

import os
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SCHEMA = """
CREATE TABLE IF NOT EXISTS accounts (
    name TEXT PRIMARY KEY, password TEXT, created REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS keys (
    hash BLOB PRIMARY KEY, account TEXT NOT NULL REFERENCES accounts ON DELETE CASCADE,
    label TEXT NOT NULL, created REAL NOT NULL, expires REAL
) STRICT;
CREATE TABLE IF NOT EXISTS sessions (
    hash BLOB PRIMARY KEY, account TEXT NOT NULL REFERENCES accounts ON DELETE CASCADE,
    csrf TEXT NOT NULL, expires REAL NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS conversations (
    id TEXT PRIMARY KEY, account TEXT NOT NULL REFERENCES accounts ON DELETE CASCADE,
    title TEXT NOT NULL, changed REAL NOT NULL, content TEXT NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS conversations_of ON conversations (account, changed);
CREATE TABLE IF NOT EXISTS usage (
    account TEXT NOT NULL REFERENCES accounts ON DELETE CASCADE, day INTEGER NOT NULL, tokens INTEGER NOT NULL,
    PRIMARY KEY (account, day)
) STRICT;
CREATE TABLE IF NOT EXISTS audit (
    time REAL NOT NULL, account TEXT NOT NULL, address TEXT NOT NULL, event TEXT NOT NULL, detail TEXT NOT NULL
) STRICT;
"""


class Database:
    """One connection, used by one thread at a time."""

    def __init__(self, path: Path) -> None:
        """Create the file where it is not there.

        Raises:
            OSError, ValueError: it cannot be written, or is no database.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))  # before SQLite makes it readable for others
        self.path, self._lock = path, threading.RLock()
        try:
            self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=10)
            self._connection.row_factory = sqlite3.Row
            self._connection.execute("PRAGMA foreign_keys = ON")
            self._connection.execute("PRAGMA journal_mode = WAL")  # the accounts tool may write while the server runs
            self._connection.execute("PRAGMA synchronous = NORMAL")
            self._connection.execute("PRAGMA secure_delete = ON")  # what is deleted is overwritten
            self._connection.executescript(SCHEMA)
        except sqlite3.DatabaseError as error:
            raise ValueError(f"database={path}: not a database of this server ({error})") from None

    def rows(self, query: str, *values: object) -> list[sqlite3.Row]:
        with self._lock:
            return self._connection.execute(query, values).fetchall()

    def row(self, query: str, *values: object) -> sqlite3.Row | None:
        return next(iter(self.rows(query, *values)), None)

    def change(self, query: str, *values: object) -> int:
        """How many rows were changed."""
        with self._lock:
            return self._connection.execute(query, values).rowcount

    @contextmanager
    def together(self) -> Iterator[None]:
        """Changes within it are made all or none."""
        with self._lock:
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def close(self) -> None:
        with self._lock:
            self._connection.close()
