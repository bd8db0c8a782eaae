"""The config.yaml of a run folder, read as data: nothing that it names is looked up or called."""

from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

# The one written in C is ten times as fast.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def read_config(path: Path) -> DictConfig:
    """The resolved configuration of a run.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is not YAML or not a mapping, or it holds an interpolation, which could read environment
            variables of this process.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=_LOADER)):
            # By aliases a small file could stand for more than memory holds.
            raise yaml.YAMLError("it holds an alias (*name)")
        content: Any = yaml.load(text, Loader=_LOADER)
        config = OmegaConf.create(content) if isinstance(content, dict) else None
    except (yaml.YAMLError, UnicodeDecodeError, OmegaConfBaseException, RecursionError) as error:
        raise ValueError(f"{path}: not the configuration of a run: {' '.join(str(error).split())}") from None
    if config is None:
        raise ValueError(f"{path}: not the configuration of a run: it must be a mapping")
    if "${" in repr(content):
        raise ValueError(f"{path}: the configuration of a run is resolved; this one holds an interpolation, ${{...}}")
    return config
