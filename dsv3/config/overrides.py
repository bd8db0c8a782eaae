"""Tries each override on top of those that fit, and explains the ones that do not."""

from collections.abc import Sequence
from itertools import islice, product

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, OverrideType
from hydra.errors import HydraException
from hydra.types import RunMode

from dsv3.config.compose import COMPOSITION_ERRORS, Composer, choices
from dsv3.config.declared import is_entry
from dsv3.config.moved import answer
from dsv3.config.problems import NO_VALUE, Problem, did_you_mean, nearest, one_of
from dsv3.config.view import View

MOST_JOBS = 64
"""Jobs of a sweep that are checked in combination; each value of the rest is still checked by itself."""


def parsed(composer: Composer, arguments: Sequence[str]) -> tuple[list[Override], list[Problem]]:
    """The overrides that are written rightly, and a problem for each that is not."""
    parser = OverridesParser.create()
    overrides, problems = [], []
    for argument in arguments:
        try:
            override = parser.parse_override(argument)
        except HydraException as error:
            key, equals, value = argument.partition("=")
            message = f"invalid Hydra override ({first_line(error)}). Write key=value"
            message += "; quote text with special characters: key=\"'...'\"." if equals else "."
            problems.append(Problem(key, value if equals else NO_VALUE, message))
        else:
            override.config_loader = composer.loader  # what glob(*) is expanded by
            overrides.append(override)
    return overrides, problems


def without_parts(composer: Composer, overrides: Sequence[Override]) -> tuple[list[Override], list[Problem]]:
    """The overrides that choose no part of a checkpoint's run, and a problem for each that does: it has no effect."""
    chosen = choices(composer.compose([]))
    free = ", ".join(sorted(chosen))
    message = f"a checkpoint fixes its components; only {free} can be set here"
    parts = [name for name in composer.groups() if name not in chosen]
    fitting = [override for override in overrides if override.key_or_group not in parts]
    refused = [override for override in overrides if override.key_or_group in parts]
    return fitting, [Problem(override.get_key_element(), override.value(), message) for override in refused]


def jobs_of(
    composer: Composer, overrides: Sequence[Override], *, multirun: bool, also: Sequence[str]
) -> tuple[list[list[str]], list[Problem]]:
    """The lists of overrides to compose (one for each job of a sweep), out of those that fit, and what does not fit."""
    if not any(override.is_sweep_override() for override in overrides):
        job = [str(override.input_line) for override in overrides]
        if _error(composer, job) is None:
            return [job], []
    if error := _error(composer, []):
        return [], [Problem(composer.config_name, NO_VALUE, f"the config itself does not compose: {error}")]
    multirun = multirun or _asks_for_multirun(composer, overrides)
    trial = _Trial(composer, multirun, also)
    for override in sorted(overrides, key=lambda override: not _is_group(composer, override)):
        trial.add(override)
    return _combined(trial.fitting), trial.problems


def _asks_for_multirun(composer: Composer, overrides: Sequence[Override]) -> bool:
    """Whether an override or a chosen file sets hydra.mode so."""
    fixed = [str(override.input_line) for override in overrides if not override.is_sweep_override()]
    return _error(composer, fixed) is None and composer.compose(fixed).hydra.mode == RunMode.MULTIRUN


def _combined(fitting: Sequence[list[str]]) -> list[list[str]]:
    """Every combination, up to MOST_JOBS; then each value beside the first of the others."""
    jobs = [list(job) for job in islice(product(*fitting), MOST_JOBS)]
    first = [values[0] for values in fitting]
    alone = [[*first[:i], line, *first[i + 1 :]] for i, values in enumerate(fitting) for line in values[1:]]
    return jobs + [job for job in alone if job not in jobs]


class _Trial:
    """Overrides are added one by one, groups first. `fitting` holds the values of each that composes."""

    def __init__(self, composer: Composer, multirun: bool, also: Sequence[str]) -> None:
        self.composer = composer
        self.multirun = multirun
        self.also = also
        self.fitting: list[list[str]] = []
        self.problems: list[Problem] = []
        self.uncertain: set[str] = set()  # groups whose option is unknown: so are their keys

    def add(self, override: Override) -> None:
        lines = _lines(override)
        if override.is_sweep_override() and not self.multirun:
            values = str(override.input_line).partition("=")[2]
            message = "several values need --multirun (-m); one list of values is written [...]"
            self.problems.append(Problem(override.get_key_element(), values, message))
        first = [values[0] for values in self.fitting]
        good = []
        for line in lines:
            error = _error(self.composer, [*first, line])
            if error is None:
                good.append(line)
            elif problem := self._explain(override, line, error, View(self.composer.compose(first))):
                self.problems.append(problem)
        if good:
            self.fitting.append(good if self.multirun else good[:1])

    def _explain(self, override: Override, line: str, error: str, view: View) -> Problem | None:
        """Why the override in `line` does not compose; None where that follows from an earlier problem."""
        key, name = override.get_key_element(), override.key_or_group
        _, equals, value = line.partition("=")
        if override.type == OverrideType.DEL:
            known = view.keys | view.choices.keys()
            message = error if name in known else f"there is nothing of this name.{did_you_mean(name, known)}"
        elif _is_group(self.composer, override):
            self.uncertain.add(name)
            message = _explain_group(override, value, error, self.composer.options(name), view)
        elif name in view.keys:
            exists = f"there is already such a key: write {name}={value}"
            free = f"entries are added one by one: +{name}.NAME=..." if is_entry(f"{name}.NAME") else error
            message = exists if override.type == OverrideType.ADD else free
        elif self._may_follow(name):
            return None
        else:
            message = self._explain_key(name, value, view)
        return Problem(key, value if equals else NO_VALUE, message)

    def _may_follow(self, name: str) -> bool:
        """Whether a key is unknown only because the option of its group is: some other option has it."""
        group = name.partition(".")[0]
        options = self.composer.options(group) if group in self.uncertain else []
        return any(name in View(self.composer.compose([f"{group}={option}"])).keys for option in options)

    def _explain_key(self, name: str, value: str, view: View) -> str:
        if message := answer(name, value, view.keys):
            return message
        if is_entry(name):
            return f"there is no such entry yet. To add it, write +{name}={value}"
        groups = self.composer.groups()
        best = nearest(name, [*view.keys, *groups, *self.also])
        if best is None:
            return f"unknown key or group. To add a new key, write +{name}={value}"
        if best not in groups:
            return f"unknown key. Did you mean {view.origin(best)!r}?"
        self.uncertain.add(best)
        options = ", ".join(self.composer.options(best))
        return f"unknown key or group. Did you mean {best!r}? Its options: {options}."


def _explain_group(override: Override, value: str, error: str, options: list[str], view: View) -> str:
    if value not in options:
        return one_of(options, value)
    name = override.get_key_element().lstrip("+")
    if override.type == OverrideType.ADD and name in view.choices:
        return f"an option of this group is chosen already: write {name}={value}"
    if override.type == OverrideType.CHANGE and name not in view.choices:
        return f"no option of this group is chosen by default: write +{name}={value}"
    return error


def _lines(override: Override) -> list[str]:
    """The override once for each value of its sweep."""
    if not override.is_sweep_override():
        return [str(override.input_line)]
    key = override.get_key_element()
    value = override.value()
    if isinstance(value, IntervalSweep):
        return [f"{key}={value.start}", f"{key}={value.end}"]
    return [f"{key}={item}" for item in override.sweep_string_iterator()]


def _is_group(composer: Composer, override: Override) -> bool:
    return bool(composer.options(override.key_or_group)) and not isinstance(override.value(), dict)


def _error(composer: Composer, job: Sequence[str]) -> str | None:
    try:
        composer.compose(job)
    except COMPOSITION_ERRORS as error:
        return first_line(error)
    return None


def first_line(error: Exception) -> str:
    """What a composition error says, without the rest of its explanation."""
    return str(error).strip().partition("\n")[0].rstrip(".")
