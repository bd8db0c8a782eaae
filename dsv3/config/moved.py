"""Names of older versions: the command line answers them with today's, and older runs are read by them."""

import copy
from collections.abc import Collection
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dsv3.config.problems import shown

MOVED = {
    "guard": "callbacks.guard",
    "ema": "callbacks.ema",
    "monitor": "callbacks.monitor",
    "diagnostics.quantisation_tokens": "callbacks.quantisation.every_tokens",
    "callbacks.guard.deviations": "callbacks.guard.threshold_sigmas",
    "callbacks.guard.rise": "callbacks.guard.min_rise",
    "callbacks.guard.most_rollbacks": "callbacks.guard.max_rollbacks",
    "run.checkpoint_tokens": "run.checkpoint_every_tokens",
    "run.validation_tokens": "run.validate_every_tokens",
    "run.weights_from": "run.init_from",
    "data.batch_sequences": "data.global_batch_size",
    "data.shuffle_rows": "data.shuffle_window",
    "data.held_out": "data.held_out_fraction",
    "dispatch.row_multiple": "dispatch.pad_multiple",
    "optimizer.rows_lr_scale": "optimizer.sparse_lr_scale",
    "optimizer.adamw_names": "optimizer.adamw_params",
    "logger.project": "logger.wandb.project",
    "logger.group": "logger.wandb.group",
    "logger.name": "logger.wandb.name",
    "precision.hold_swiglu_inputs": "precision.save_swiglu_inputs",
}
"""Old key, or whole mapping -> today's; each line is applied to what the lines above have made of a key."""

OPTIONS = {
    "shots": "num_fewshot",
    "results": "output_path",
    "allow_unsafe_code": "confirm_run_unsafe_code",
    "sequence": "seq_len",
    "micro_batches": "num_microbatches",
    "zero": "zero_stage",
    "picture": "plot",
}
"""The same of tools and of `evaluate.py`: old name of an option or of a tool -> today's."""

VALUES = {
    "attention.decode": {"absorbed": "absorb", "plain": "naive"},
    "study.metric": {
        "held-out all, averaged weights": "held-out all, EMA weights",
        "training loss, last tenth": "training loss, last 10% of tokens",
        "max violation, last tenth": "MaxVio, last 10% of tokens",
        "nodes of a token": "nodes per token",
        "exact answers": "exact match",
    },
}
"""Key -> old value -> what it is called now."""


OLDER_PACKING = "windows"
"""`data.packing` of runs whose rows were shuffled within windows: no option of today, but read."""


def moved(key: str) -> str | None:
    """Today's name of an old key, option or tool; None if it is not an old one."""
    now = OPTIONS.get(key, key)
    for old, new in MOVED.items():
        if f"{now}.".startswith(f"{old}."):
            now = new + now.removeprefix(old)
    return now if now != key else None


def answer(key: str, value: Any, known: Collection[str]) -> str | None:
    """The message for an old key; None if it is none, or if its new name is not among those `known` here."""
    now = moved(key)
    return f"this key is now called {now}: write {now}={shown(value)}" if now in known else None


def todays_value(key: str, value: Any) -> Any:
    """Today's name of a value that an older version had another name for; every other value as it is."""
    return VALUES.get(key, {}).get(value, value) if isinstance(value, str) else value


def upgraded(old: DictConfig, current: DictConfig | None = None) -> DictConfig:
    """The config of an older run with today's keys and values.

    current: where it is given, a part that older versions had none of is as it is there.
    """
    config = copy.deepcopy(old)
    for part in ("reward", "objective", "callbacks", "callbacks.rollouts"):
        todays = OmegaConf.select(current, part) if current is not None else None
        if todays is not None and OmegaConf.select(config, part) is None:
            OmegaConf.update(config, part, OmegaConf.to_container(todays, resolve=True))
    _upgrade_logger(config)
    if isinstance(config.get("run"), DictConfig):
        config.run = OmegaConf.merge({"init_partly": False, "freeze": []}, config.run)
    for key, now in MOVED.items():
        _move(config, key, now)
    _upgrade_data(config)
    for key in VALUES:
        if (value := OmegaConf.select(config, key)) is not None:
            OmegaConf.update(config, key, todays_value(key, value))
    return config


def _upgrade_logger(config: DictConfig) -> None:
    """There was one logger without a name, or a function that made none."""
    logger = config.get("logger")
    if isinstance(logger, DictConfig) and (target := logger.get("_target_")) is not None:
        name = "wandb" if target.endswith(".wandb_logger") else "own"
        config.logger = {} if target == "plugins.logger.none.no_logger" else {name: logger}


def _upgrade_data(config: DictConfig) -> None:
    """Settings of data whose rows were shuffled within windows: they are scored on what they held out, by that rule."""
    data = config.get("data")
    if isinstance(data, DictConfig) and data.pop("shuffle_window", None) is not None:
        limits = {"held_out_bytes": 32_000_000, "max_document_bytes": 256_000_000, "processes": None}
        config.data = OmegaConf.merge(limits, data, {"packing": OLDER_PACKING})


def _move(config: DictConfig, key: str, now: str) -> None:
    parent, _, name = key.rpartition(".")
    holder = OmegaConf.select(config, parent) if parent else config
    if not isinstance(holder, DictConfig) or name not in holder:
        return
    value = holder.pop(name)
    if not holder:
        del config[parent]
    OmegaConf.update(config, now, value, merge=True)
