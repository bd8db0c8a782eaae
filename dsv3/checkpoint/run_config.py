"""The config.yaml of a run folder, read as data: nothing that it names is looked up or called."""

from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dsv3.config.moved import upgrade
from dsv3.config.plain_settings import Settings

# The one written in C is ten times as fast.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_settings(path: Path, current: DictConfig | None = None) -> Settings:
    """The resolved configuration of a run as plain mappings and lists, under the names of today.

    current: as for `upgrade`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML or not a mapping, or it holds an interpolation, which could read environment
            variables of this process.
    """
    try:
        text = path.read_text(encoding="utf-8")
        # By aliases a small file could stand for more than memory holds.
        if "*" in text and any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=_LOADER)):
            raise yaml.YAMLError("it holds an alias (*name)")
        settings: Any = yaml.load(text, Loader=_LOADER)
        if not isinstance(settings, dict):
            raise yaml.YAMLError("it must be a mapping")
        if "${" in repr(settings):
            raise yaml.YAMLError("that of a run is resolved; this one holds an interpolation, ${...}")
        upgrade(settings, current)
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise _no_configuration(path, error) from None
    return settings


def read_config(path: Path, current: DictConfig | None = None) -> DictConfig:
    """`read_settings` as OmegaConf has it, which takes ten times as long. Raises the same."""
    settings = read_settings(path, current)
    try:
        return OmegaConf.create(settings)
    except (OmegaConfBaseException, RecursionError) as error:
        raise _no_configuration(path, error) from None


def _no_configuration(path: Path, error: Exception) -> ValueError:
    return ValueError(f"{path}: not the configuration of a run: {' '.join(str(error).split())}")
