"""A composed config as dotted keys."""

import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException

from dsv3.config.compose import choices
from dsv3.config.declared import is_entry
from dsv3.config.moved import answer
from dsv3.config.problems import NO_VALUE, Problem, did_you_mean, shown

_ONE_KEY = re.compile(r"\$\{([\w.]+)\}")
_NAMED = re.compile(r"Interpolation key '([^']+)' not found")


class View:
    """What a config holds under each dotted key; places in a list are numbered (`schedule.segments.0.until`).

    leaves: key -> resolved value of everything that is not a mapping (a list is a leaf, its mappings are entered too).
    mappings: key -> names under it.
    raw: key -> text of those that are interpolations.
    choices: group -> chosen option.
    launcher: Hydra's option that a sweep's jobs go to.
    missing: keys of mandatory values that are not given.
    problems: interpolations that name no key, and mandatory values that are missing.
    """

    def __init__(self, config: DictConfig) -> None:
        self._config = config
        self.choices = choices(config)
        self.launcher: str | None = config.hydra.runtime.choices.get("hydra/launcher")
        self.leaves: dict[str, Any] = {}
        self.mappings: dict[str, list[str]] = {}
        self.raw: dict[str, str] = {}
        self.missing: set[str] = set()
        self.problems: list[Problem] = []
        tree = OmegaConf.to_container(config, resolve=False)
        assert isinstance(tree, dict)
        tree.pop("hydra", None)
        self._names = _dotted(tree, "")
        for name, child in tree.items():
            self._enter(str(name), child)

    def _enter(self, key: str, value: Any) -> None:
        if isinstance(value, dict):
            self.mappings[key] = [str(name) for name in value]
            for name, child in value.items():
                self._enter(f"{key}.{name}", child)
            return
        if isinstance(value, str) and "${" in value:
            self.raw[key] = value
            value = self._resolved(key, value)
        elif value == "???":
            self.missing.add(key)
            self.problems.append(Problem(key, NO_VALUE, f"required: {key}=..."))
            return
        elif isinstance(value, list):
            for i, child in enumerate(value):
                if isinstance(child, dict):
                    self._enter(f"{key}.{i}", child)
            value = self.value(key)
        if value is not NO_VALUE:
            self.leaves[key] = value

    def _resolved(self, key: str, text: str) -> Any:
        """The value behind an interpolation; NO_VALUE where it has none yet, or comes from a resolver of Hydra's."""
        try:
            return self._select(key)
        except InterpolationKeyError as error:
            if (named := _NAMED.search(str(error))) and named[1] in text:
                message = f"interpolates {named[1]!r}, and unknown key."
                self.problems.append(Problem(key, text, message + did_you_mean(named[1], self._names)))
        except OmegaConfBaseException:
            pass
        return NO_VALUE

    def _select(self, key: str) -> Any:
        value = OmegaConf.select(self._config, key)
        return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value

    @cached_property
    def keys(self) -> set[str]:
        return {*self._names, *self.leaves, *self.mappings, *self.raw}

    def value(self, key: str) -> Any:
        """The resolved value under a key, mappings included; NO_VALUE where something in it does not resolve."""
        if key in self.leaves:
            return self.leaves[key]
        try:
            return self._select(key)
        except OmegaConfBaseException:
            return NO_VALUE

    def origin(self, key: str) -> str:
        """The key that holds the value: what `${...}` leads to, followed to its end."""
        seen = {key}
        while (found := _ONE_KEY.fullmatch(self.raw.get(key, ""))) and found[1] not in seen:
            key = found[1]
            seen.add(key)
        return key


def _dotted(tree: Any, prefix: str) -> list[str]:
    if not isinstance(tree, dict):
        return []
    return [f"{prefix}{name}" for name in tree] + [
        key for name, child in tree.items() for key in _dotted(child, f"{prefix}{name}.")
    ]


def check_defaults(view: View, reference: View, governed: set[str]) -> list[Problem]:
    """Compare with the config in which nothing is overridden: types, and names that an experiment file or `+` adds.

    governed: keys whose type a signature has decided. What a plugin makes of null only its signature could tell; the
    core's own keys, which are of no group, take null only where that is the default.
    """
    read = {name for text in view.raw.values() for name in _ONE_KEY.findall(text)}
    problems = []
    for key in (view.leaves.keys() | view.mappings.keys()) - governed:
        if key in reference.mappings and not isinstance(view.leaves.get(key), dict | None):
            message = f"must be a mapping, with the keys {', '.join(reference.mappings[key])}"
            problems.append(Problem(key, view.leaves[key], message))
        elif is_entry(key) and not isinstance(view.leaves.get(key, {}), dict):
            problems.append(Problem(key, view.leaves[key], "must be a mapping of settings, such as {}"))
        elif key in reference.leaves and key not in view.raw:
            default = reference.leaves[key]
            value = view.leaves[key] if key in view.leaves else view.value(key)
            own = key.partition(".")[0] not in view.choices
            if needed := _mismatch(value, default, null_passes=not own):
                problems.append(Problem(key, value, type_needed(needed, value, default)))
        elif _is_stray(key, view, reference) and not any(_within(key, name) or _within(name, key) for name in read):
            known = [k for k in reference.keys if k.rpartition(".")[0] == key.rpartition(".")[0]]
            value = view.value(key)
            unknown = f"unknown key.{did_you_mean(key, known or reference.keys)}"
            message = answer(key, value, reference.keys) or unknown
            problems.append(Problem(key, value, message))
    return sorted(problems, key=lambda problem: problem.key)


def type_needed(words: str, value: Any, default: Any) -> str:
    """What a value of the wrong type should be; `default` None or NO_VALUE: there is no example to give."""
    if words.startswith("an integer") and isinstance(value, float) and value.is_integer():
        return f"must be {words}: write {int(value)}"
    numeric = words.startswith(("an integer", "a number"))
    if numeric and isinstance(value, str) and re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?", value):
        return f"must be {words}: write {value} without quotes"
    example = "" if default is None or default is NO_VALUE else f", such as the default {shown(default)}"
    return f"must be {words}{example}"


def _within(key: str, parent: str) -> bool:
    return f"{key}.".startswith(f"{parent}.")


def _is_stray(key: str, view: View, reference: View) -> bool:
    """Whether a key is new in a mapping of the core's own, whose names are all known.

    What lies below a `_target_` is judged by its signature; `trainer` is Lightning's; whole parts may be added, and
    entries of any name where `NODES` declares them.
    """
    if key in reference.keys or key.partition(".")[0] == "trainer":
        return False
    parent = key.rpartition(".")[0]
    known = (not parent or parent in reference.mappings) and not is_entry(key)
    return known and not any("_target_" in view.mappings.get(mapping, []) for mapping in _upwards(key))


def _upwards(key: str) -> Iterator[str]:
    while key:
        yield key
        key = key.rpartition(".")[0]


def _mismatch(value: Any, default: Any, *, null_passes: bool) -> str | None:
    """The type needed, in words, if `value` has another than `default`; unknown types pass."""
    if default is None or value is NO_VALUE or (value is None and null_passes):
        return None
    if isinstance(value, dict) and "_target_" in value:
        return None
    for kind, accepted, words in KINDS:
        if isinstance(default, kind):
            boolean_as_number = isinstance(value, bool) and kind is not bool
            return words if boolean_as_number or not isinstance(value, accepted) else None
    return None


KINDS: tuple[tuple[type, tuple[type, ...], str], ...] = (
    (bool, (bool,), "true or false"),  # before int, of which bool is a kind
    (int, (int,), "an integer"),
    (float, (int, float), "a number"),
    (str, (str,), "a text"),
    (list, (list, tuple), "a list"),
)
"""Type of the default -> types that may take its place, and their name in a message."""
