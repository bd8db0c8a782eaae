"""Journal of finished episodes, from which an interrupted evaluation goes on."""

import json
from pathlib import Path
from typing import Any

from dsv3.strict_json import text_of


class Journal:
    """One line of JSON for each finished episode; without a path nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._found = dict(self._lines())

    def find(self, game: Any) -> dict[str, Any] | None:
        return self._found.get(_key(game))

    def add(self, game: Any, result: dict[str, Any]) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(b"\n" * self._is_torn() + text_of([_key(game), result], indent=None).encode() + b"\n")

    def _lines(self) -> list[tuple[str, dict[str, Any]]]:
        """Whole lines; one that a killed evaluation left half-written is passed over."""
        found = []
        for line in self.path.read_bytes().split(b"\n") if self.path is not None and self.path.exists() else []:
            try:
                key, result = json.loads(line)
                found.append((key, result))
            except ValueError:
                continue
        return found

    def _is_torn(self) -> bool:
        """Whether the last line has no end."""
        assert self.path is not None
        return self.path.exists() and self.path.read_bytes()[-1:] not in (b"", b"\n")


def _key(game: Any) -> str:
    return text_of(game, indent=None)
