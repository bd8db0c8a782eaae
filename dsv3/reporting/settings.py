"""Settings of runs as flat keys, and those in which they differ."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from dsv3.reporting.history import History

log = logging.getLogger(__name__)

LEFT_OUT = ("run.dir", "run.name", "run.experiment", "hydra")
"""Where a run lies is no setting."""
MOST_LETTERS = 200


def flat_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Key -> value: `router.top_k`; the class of a part under the part's own key: `router` -> `SigmoidRouter`."""
    flat: dict[str, Any] = {}
    add("", settings, flat)
    return {key: value for key, value in flat.items() if not key.startswith(LEFT_OUT)}


def add(key: str, value: Any, flat: dict[str, Any]) -> None:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            if name == "_target_":
                flat[key] = str(inner).rpartition(".")[2]
            elif name != "_partial_":
                add(f"{key}.{name}" if key else str(name), inner, flat)
    elif isinstance(value, int | float | bool):
        flat[key] = value
    elif value is not None:
        flat[key] = str(value)[:MOST_LETTERS]


def settings_of(run: History) -> dict[str, Any]:
    """None of a run whose config.yaml cannot be read."""
    try:
        settings = run.settings
        return run.kept("settings", (settings,), lambda: flat_settings(settings))
    except Exception as error:  # a run folder may hold anything
        log.warning("%s: %s", run.folder.config_path, error)
        return {}


def differing(runs: Sequence[History]) -> dict[str, list[Any]]:
    """Key -> each run's value (None: it has no such key), of keys in which the runs differ, in config.yaml's order.

    Of keys that end alike and have the same values in every run, the first stands for all: a resolved configuration
    repeats what its parts share.
    """
    settings = [settings_of(run) for run in runs]
    keys = dict.fromkeys(key for each in settings for key in each)
    found: dict[tuple[str, str], tuple[str, list[Any]]] = {}
    for key in keys:
        values = [each.get(key) for each in settings]
        if any(value != values[0] for value in values):
            found.setdefault((key.rpartition(".")[2], repr(values)), (key, values))
    return dict(found.values())
