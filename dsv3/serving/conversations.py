"""Conversations of the web chat, kept for each account."""

import json
import secrets
import time
from typing import Any

from dsv3.serving.database import Database

MOST = 500
"""Conversations of an account."""
LARGEST = 1_000_000
"""Characters of one."""


class Conversations:
    """Every method takes the account, and finds nothing of another one's."""

    def __init__(self, database: Database) -> None:
        self.database = database

    def listed(self, account: str) -> list[dict[str, Any]]:
        """The newest first, without their content."""
        query = "SELECT id, title, changed FROM conversations WHERE account = ? ORDER BY changed DESC"
        return [dict(row) for row in self.database.rows(query, account)]

    def get(self, account: str, id: str) -> dict[str, Any] | None:
        query = "SELECT id, title, changed, content FROM conversations WHERE account = ? AND id = ?"
        row = self.database.row(query, account, id)
        return None if row is None else {**dict(row), "content": json.loads(row["content"])}

    def add(self, account: str, title: str, content: Any) -> str:
        """Its id. Raises ValueError where it is too large or there are too many."""
        row = self.database.row("SELECT count(*) AS held FROM conversations WHERE account = ?", account)
        if row is not None and row["held"] >= MOST:
            raise ValueError(f"there are {MOST} conversations already; delete some first")
        id = secrets.token_urlsafe(12)
        query = "INSERT INTO conversations VALUES (?, ?, ?, ?, ?)"
        self.database.change(query, id, account, title, time.time(), text_of(content))
        return id

    def change(self, account: str, id: str, title: str, content: Any) -> bool:
        """Whether there is such a conversation. Raises ValueError where it is too large."""
        query = "UPDATE conversations SET title = ?, content = ?, changed = ? WHERE account = ? AND id = ?"
        return self.database.change(query, title, text_of(content), time.time(), account, id) > 0

    def delete(self, account: str, id: str | None) -> int:
        """How many were deleted. `id`: None for all."""
        if id is None:
            return self.database.change("DELETE FROM conversations WHERE account = ?", account)
        return self.database.change("DELETE FROM conversations WHERE account = ? AND id = ?", account, id)

    def export(self, account: str) -> list[dict[str, Any]]:
        query = "SELECT id, title, changed, content FROM conversations WHERE account = ? ORDER BY changed"
        return [{**dict(row), "content": json.loads(row["content"])} for row in self.database.rows(query, account)]


def text_of(content: Any) -> str:
    text = json.dumps(content, ensure_ascii=False)
    text.encode()  # a ValueError where it is no Unicode
    if len(text) > LARGEST:
        raise ValueError(f"the conversation has {len(text):,} characters; at most {LARGEST:,} are kept")
    return text
