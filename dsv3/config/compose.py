"""Composes configurations as `@hydra.main` will, without starting it."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from dsv3.paths import CONF

EXPERIMENT = "experiment"
"""The group whose files set keys of all the others."""

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, ValueError)


def hydra_flags(arguments: Sequence[str]) -> argparse.Namespace:
    """Split Hydra's own flags from the overrides, as Hydra does. An unknown flag exits with argparse's message."""
    return get_args_parser().parse_args(list(arguments))


def asks_for_help(arguments: Sequence[str]) -> bool:
    return any(argument in ("-h", "--help") for argument in arguments)


def shows_only(arguments: Sequence[str]) -> bool:
    """Whether Hydra will only print something (`--cfg`, `--info`, `--hydra-help`, ...) or rerun a recorded job."""
    flags = hydra_flags(arguments)
    return bool(
        flags.cfg or flags.info or flags.hydra_help or flags.shell_completion or flags.experimental_rerun is not None
    )


def job_of_sweep() -> list[str] | None:
    """Arguments of `train.py` that give the job of a sweep which this process is at; None: it is at no sweep."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    job = HydraConfig.get()
    folders = [source.path for source in job.runtime.config_sources if source.provider == "command-line"]
    return [*(f"--config-dir={folder}" for folder in folders), *job.overrides.task, "hydra.mode=RUN"]


class Composer:
    """Composes one primary config with varying overrides."""

    def __init__(self, config_name: str, folders: Sequence[Path]) -> None:
        self.config_name = config_name
        self.folders = folders  # where YAML files lie, first found first
        self.loader = GlobalHydra.instance().config_loader()
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def compose(self, overrides: Sequence[str]) -> DictConfig:
        """The composed config, with the `hydra` node. Raises one of COMPOSITION_ERRORS."""
        key = tuple(overrides)
        if key not in self._composed:
            self._composed[key] = compose(self.config_name, overrides=list(overrides), return_hydra_config=True)
        return self._composed[key]

    def options(self, group: str) -> list[str]:
        """Names of a group's options; empty if there is no such group."""
        return [] if group.endswith(".") else sorted(self.loader.get_group_options(group))

    def groups(self) -> list[str]:
        """Every group there is, Hydra's own left out."""
        found: list[str] = []
        pending = [""]
        while pending:
            parent = pending.pop()
            for name in self.loader.list_groups(parent):
                group = f"{parent}/{name}" if parent else name
                if group != "hydra":
                    found.append(group)
                    pending.append(group)
        return sorted(group for group in found if self.options(group))

    def reference(self, job: Sequence[str], config: DictConfig) -> DictConfig:
        """The config with the same options chosen, but no key set by an override or by an experiment."""
        paths = [override for override in job if override.startswith("hydra.searchpath")]
        chosen = choices(config)
        without = [f"~{EXPERIMENT}"] if chosen.pop(EXPERIMENT, None) else []
        try:
            return self.compose([*paths, *(f"{group}={_written(chosen[group])}" for group in chosen), *without])
        except COMPOSITION_ERRORS:  # some group is not chosen by default
            default = choices(self.compose(paths))
            signs = {group: "" if group in default else "+" for group in chosen}
            added = [f"{signs[group]}{group}={_written(chosen[group])}" for group in chosen]
            return self.compose([*paths, *added, *(without if EXPERIMENT in default else [])])


def choices(config: DictConfig) -> dict[str, Any]:
    """Group -> chosen option, Hydra's own groups left out."""
    chosen = config.hydra.runtime.choices
    return {group: chosen[group] for group in chosen if not group.startswith("hydra/")}


def _written(option: Any) -> str:
    if option is None:
        return "null"
    return option if isinstance(option, str) else f"[{','.join(option)}]"


def make_importable(folder: Path) -> None:
    """Let `_target_`s of the configurations in `folder` name modules that lie in it or beside it."""
    for place in (folder.resolve(), folder.resolve().parent):
        if str(place) not in sys.path:
            sys.path.append(str(place))


@contextmanager
def opened(config_name: str, flags: argparse.Namespace) -> Iterator[Composer]:
    """A Composer on conf/, or on what the flags --config-name, --config-path and --config-dir say."""
    main = (CONF.parent / flags.config_path).resolve() if flags.config_path else CONF
    with initialize_config_dir(str(main), version_base="1.3"):
        folders = [main]
        if flags.config_dir:
            own = Path(flags.config_dir).resolve()
            make_importable(own)
            folders.insert(0, own)
            search_path = create_config_search_path(str(main))
            anchor = SearchPathQuery(provider="schema")
            search_path.prepend(provider="command-line", path=f"file://{own}", anchor=anchor)
            GlobalHydra.instance().clear()
            Hydra.create_main_hydra2(task_name="preflight", config_search_path=search_path)
        yield Composer(flags.config_name or config_name, folders)
