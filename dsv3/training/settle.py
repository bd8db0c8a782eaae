"""Choices made once when training begins: device, numeric format, and the engine that decodes text.

What they are is written into config.yaml. A resumed run keeps them, and a study gives them to every job, so that all of
its arms are computed alike.
"""

import logging

from omegaconf import DictConfig, OmegaConf

from dsv3.checkpoint.run_folder import RunFolder
from dsv3.config.known_parts import refuse_unknown_parts, targets
from dsv3.config.part import part
from dsv3.contracts import Settles
from dsv3.inference.engines import chosen_engine
from dsv3.runtime import device_named

log = logging.getLogger(__name__)

SETTLED = "precision"
"""The kind of part that may leave a choice open."""


def open_choices(config: DictConfig) -> list[str]:
    """Keys under `precision` that are still null and that the part can settle."""
    precision = config[SETTLED]
    if not isinstance(part(precision), Settles):
        return []
    return [f"{SETTLED}.{key}" for key, value in precision.items() if value is None]


def kept_choices(config: DictConfig, folder: RunFolder) -> DictConfig:
    """The config with open choices as the folder's run has made them already, if it continues."""
    if config.resume == "never" or not folder.config_path.exists():
        return config
    before = folder.config()
    if OmegaConf.select(before, f"{SETTLED}._target_") != config[SETTLED]._target_:
        return config
    given = [target for _, target in targets(OmegaConf.to_container(config))]
    refuse_unknown_parts({SETTLED: OmegaConf.to_container(before[SETTLED])}, source=folder.config_path, allow=given)
    return with_choices(config, {key: OmegaConf.select(before, key) for key in open_choices(config)})


def settled(config: DictConfig) -> DictConfig:
    """The config with its device resolved and every open choice made; says which and why.

    Raises:
        ValueError: `trainer.accelerator=cuda` and torch sees no GPU, or `engine=onnx` and its graph lacks a part.
    """
    device = device_named(config.trainer.accelerator, key="trainer.accelerator")
    engine = chosen_engine(config.engine, config, device)
    config = with_choices(config, {"trainer.accelerator": device.type, "engine": engine})
    chooser = part(config[SETTLED])
    if isinstance(chooser, Settles) and open_choices(config):
        choices, why = chooser.settle(device)
        log.info("%s: %s", SETTLED, why)
        config = with_choices(config, {f"{SETTLED}.{key}": value for key, value in choices.items()})
    return config


def with_choices(config: DictConfig, choices: dict[str, object]) -> DictConfig:
    """A copy of the config with these keys set."""
    copy = OmegaConf.merge(config)
    assert isinstance(copy, DictConfig)
    for key, value in choices.items():
        OmegaConf.update(copy, key, value)
    return copy
