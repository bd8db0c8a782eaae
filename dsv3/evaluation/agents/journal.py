"""Journal of an evaluation of agents, from which an interrupted one goes on.

[game, {"first": n, "steps": [...]}]   steps of an episode from its step n on, every few steps
[game, {"result": {...}}]              a finished episode
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dsv3.strict_json import text_of


class Journal:
    """Lines of JSON, appended; without a path nothing is kept."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._results: dict[str, dict[str, Any]] = {}
        self._steps: dict[str, list[dict[str, Any]]] = {}
        self._read()

    def result(self, game: Any) -> dict[str, Any] | None:
        """Of a finished episode."""
        return self._results.get(_key(game))

    def steps(self, game: Any) -> list[dict[str, Any]]:
        """The steps of an unfinished episode, as far as they are known."""
        return self._steps.get(_key(game), [])

    def finish(self, game: Any, result: dict[str, Any]) -> None:
        self._append(game, {"result": result})

    def keep(self, game: Any, steps: Sequence[dict[str, Any]], *, first: int) -> None:
        if len(steps) > first:
            self._append(game, {"first": first, "steps": list(steps[first:])})

    def _append(self, game: Any, content: dict[str, Any]) -> None:
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(b"\n" + text_of([_key(game), content], indent=None).encode())

    def _read(self) -> None:
        """Whole lines; one that a killed evaluation left half-written is passed over, and so is what followed it."""
        for line in self.path.read_bytes().split(b"\n") if self.path is not None and self.path.exists() else []:
            try:
                key, content = json.loads(line)
            except ValueError:
                continue
            if "result" in content:
                self._results[key] = content["result"]
            elif content["first"] == len(self._steps.setdefault(key, [])):
                self._steps[key] += content["steps"]


def _key(game: Any) -> str:
    return text_of(game, indent=None)
