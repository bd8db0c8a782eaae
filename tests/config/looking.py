"""Helpers of the preflight tests: the shipped options, and views of problems."""

from omegaconf import OmegaConf

from dsv3.config.problems import Problem
from dsv3.paths import CONF

OPTIONS = sorted(
    (path.parent.relative_to(CONF).as_posix(), path.stem) for path in CONF.rglob("*.yaml") if path.parent != CONF
)
BASE = ["model=tiny", "logger=none"]


def groups_of(config_name: str) -> set[str]:
    """The groups of which a primary config chooses an option."""
    defaults = OmegaConf.load(CONF / f"{config_name}.yaml").defaults
    return {str(group).removeprefix("override ") for default in defaults if default != "_self_" for group in default}


def keys_of(problems: list[Problem]) -> list[str]:
    return sorted(problem.key for problem in problems)


def only(problems: list[Problem]) -> Problem:
    assert len(problems) == 1, problems
    return problems[0]
