"""Runs that are picked by conditions on their settings and figures, and arms by the settings in which runs differ."""

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dsv3.config.plain_settings import value_of
from dsv3.config.problems import did_you_mean
from dsv3.paths import CONF
from dsv3.reporting.history import History
from dsv3.reporting.overview import overview
from dsv3.reporting.settings import differing, settings_of

SIGNS: dict[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "=": operator.eq,
    "<": operator.lt,
    ">": operator.gt,
}
CONDITION = re.compile(rf"\s*(\w[\w.]*(?:/\w+)*)\s*({'|'.join(SIGNS)})\s*(.*?)\s*")
FIGURES = ("run", "state", "tokens", "bpb", "max_violation")
"""Of `overview`, besides the settings."""
NO_ARM = ("seed", "study", "logger", "run.checkpoint", "run.keep")
"""Beginnings of settings that make no other arm."""
MOST_KEYS = 3
"""Settings in the name of an arm; of more, its runs' folder is its name."""


class Condition(NamedTuple):
    key: str
    sign: str
    text: str

    def holds(self, values: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
        """values: a run's figures and flat settings. settings: the same, nested. A run without the key only fails to
        equal."""
        value, asked = values.get(self.key), read(self.text)
        if self.sign in ("=", "!="):
            equal = value == asked or str(value) == self.text or is_option(self.key, self.text, settings)
            return equal == (self.sign == "=")
        numbers = all(isinstance(each, int | float) for each in (value, asked))
        return numbers and SIGNS[self.sign](value, asked)


def read(text: str) -> Any:
    """A value as in a configuration; itself where it is none."""
    try:
        return OmegaConf.to_container(OmegaConf.create(f"value: {text}"), resolve=False)["value"]  # type: ignore[index,call-overload]
    except (YAMLError, OmegaConfBaseException):
        return text


def conditions(text: str) -> list[Condition]:
    """Of `balancing=loss_free, bpb<2.1`.

    Raises:
        ValueError: it is no list of conditions.
    """
    found = [CONDITION.fullmatch(part) for part in text.split(",")]
    if not all(found):
        raise ValueError(f"where={text}: must be KEY=VALUE, or several with commas between; also !=, <, >, <= and >=")
    return [Condition(*match.groups()) for match in found if match]


def is_option(group: str, option: str, settings: Mapping[str, Any]) -> bool:
    """Whether a run has the classes that conf/<group>/<option>.yaml names, or where it names none, its values."""
    if not re.fullmatch(r"\w+", option) or not (CONF / group / f"{option}.yaml").is_file():
        return False
    given = leaves(value_of(settings, group.replace("/", ".")))
    asked = option_leaves(group, option)
    return bool(asked) and all(given.get(key) == value for key, value in asked.items())


@cache
def option_leaves(group: str, option: str) -> dict[str, Any]:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        composed = compose("train", overrides=[f"{group}={option}"])
    every = leaves(OmegaConf.select(composed, group.replace("/", ".")))
    return {key: value for key, value in every.items() if key.endswith("_target_")} or every


def leaves(node: Any, before: str = "") -> dict[str, Any]:
    """Values of a configuration by their keys, interpolations left out."""
    if OmegaConf.is_config(node):
        node = OmegaConf.to_container(node, resolve=False)
    if isinstance(node, dict):
        return {k: v for name, inner in node.items() for k, v in leaves(inner, f"{before}.{name}").items()}
    return {} if node is None or (isinstance(node, str) and "${" in node) else {before: node}


def picked(runs: Sequence[History], where: str | None) -> list[History]:
    """The runs for which all conditions hold; None: all.

    Raises:
        ValueError: see `conditions`; no run has such a key, or none is picked.
    """
    if where is None:
        return list(runs)
    asked = conditions(where)
    known = [{**overview(run), **settings_of(run)} for run in runs]
    for condition in asked:
        keys = dict.fromkeys([*FIGURES, *(key for values in known for key in values)])
        if condition.key not in keys and not (CONF / condition.key).is_dir():
            raise ValueError(f"where={where}: no run has a key {condition.key}.{did_you_mean(condition.key, keys)}")
    found = [
        run
        for run, values in zip(runs, known, strict=True)
        if all(condition.holds(values, run.settings) for condition in asked)
    ]
    if not found:
        named = [values | options_of(run.settings, asked) for run, values in zip(runs, known, strict=True)]
        raise ValueError(f"where={where}: holds for none of the {len(runs)} runs; {values_of(asked, named)}")
    return found


def options_of(settings: Mapping[str, Any], asked: Sequence[Condition]) -> dict[str, str]:
    """By group that a condition names: the option of conf/ that a run has, where it is one."""
    groups = {condition.key for condition in asked if (CONF / condition.key).is_dir()}
    options = {group: [file.stem for file in sorted((CONF / group).glob("*.yaml"))] for group in groups}
    found = {group: [name for name in options[group] if is_option(group, name, settings)] for group in groups}
    return {group: " or ".join(names) for group, names in found.items() if names}


def values_of(asked: Sequence[Condition], known: Sequence[Mapping[str, Any]]) -> str:
    keys = dict.fromkeys(condition.key for condition in asked)
    of_keys = {key: sorted({str(values.get(key)) for values in known})[:8] for key in keys}
    return "; ".join(f"{key} is {', '.join(values)}" for key, values in of_keys.items())


class Arms(NamedTuple):
    """Runs by arm and seed, what each arm is, and the runs that repeat another's settings and seed."""

    runs: dict[str, dict[int, History]]
    overrides: dict[str, str]
    repeated: list[str]


def by_settings(runs: Sequence[History]) -> Arms:
    """Runs that differ in their seeds alone are an arm."""
    rows = {key: values for key, values in differing(runs).items() if not key.startswith(NO_ARM)}
    arms = Arms({}, {}, [])
    names: dict[str, str] = {}
    for i, run in enumerate(runs):
        settings = {key: values[i] for key, values in rows.items()}
        text = " ".join(f"{key}={value}" for key, value in settings.items() if value is not None)
        name = names.setdefault(text, short(settings, run, names.values()))
        seeds, seed = arms.runs.setdefault(name, {}), int(run.setting("seed") or 0)
        arms.overrides[name] = text
        if seed in seeds:
            arms.repeated.append(run.name)
        else:
            seeds[seed] = run
    return arms


def short(settings: Mapping[str, Any], run: History, taken: Any) -> str:
    """A name for an arm: its settings where they are few, without those of a part that differs, or its folder."""
    words = [
        f"{key.rpartition('.')[2]}={value}"
        for key, value in settings.items()
        if value is not None and not any(key.startswith(f"{part}.") for part in settings)
    ]
    folder = re.sub(r"/?seed\d+$", "", run.name) or run.name
    name = ", ".join(words) if 0 < len(words) <= MOST_KEYS else folder
    return name if name not in taken else run.name
