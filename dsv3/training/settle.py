"""Choices made once when training begins: device, numeric format, and the engine that decodes text.

What they are is written into config.yaml. A resumed run keeps them, and a study gives them to every job, so that all of
its arms are computed alike.
"""

import logging
import os

import torch
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


def settled(config: DictConfig, folder: RunFolder) -> DictConfig:
    """The config with its device resolved and every open choice made, or kept from the folder's run.

    Logs the first line of a run: device, threads and numeric format, each with the reason for it.

    Raises:
        ValueError: `trainer.accelerator=cuda` and torch sees no GPU, or `engine=onnx` and its graph lacks a part.
    """
    device = device_named(config.trainer.accelerator, key="trainer.accelerator")
    kept = kept_choices(with_choices(config, {"trainer.accelerator": device.type}), folder)
    chooser = part(kept[SETTLED])
    if isinstance(chooser, Settles) and open_choices(kept):
        choices, why = chooser.settle(device)
        kept = with_choices(kept, {f"{SETTLED}.{key}": value for key, value in choices.items()})
    elif open_choices(config):
        why = ", ".join(f"{kept[SETTLED][key.partition('.')[2]]}" for key in open_choices(config))
        why += f" (chosen when the run began: {folder.config_path.name})"
    else:
        why = f"{kept[SETTLED]._target_.rpartition('.')[2]} (configured)"
    log.info("device: %s; %s; precision: %s", reason_for(device, config.trainer.accelerator), threads(), why)
    return with_choices(kept, {"engine": chosen_engine(config.engine, config, device)})


def reason_for(device: torch.device, asked: str) -> str:
    """The device with its name, and why it is that one."""
    if asked != "auto":
        why = f"trainer.accelerator={asked}"
    else:
        why = "torch sees a GPU" if device.type == "cuda" else "torch sees no GPU"
    name = f" {torch.cuda.get_device_name()}" if device.type == "cuda" else ""
    return f"{device.type}{name} ({why})"


def threads() -> str:
    """Threads of torch's operations on the CPU, and what set their number."""
    number, set_by = torch.get_num_threads(), os.environ.get("OMP_NUM_THREADS")
    why = f"OMP_NUM_THREADS={set_by}" if set_by else f"of {os.cpu_count()} CPUs; OMP_NUM_THREADS is not set"
    return f"threads: {number} ({why})"


def with_choices(config: DictConfig, choices: dict[str, object]) -> DictConfig:
    """A copy of the config with these keys set."""
    copy = OmegaConf.merge(config)
    assert isinstance(copy, DictConfig)
    for key, value in choices.items():
        OmegaConf.update(copy, key, value)
    return copy
