"""Names of older versions: the command line answers them with today's, and older runs are read by them."""

from collections.abc import Collection
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dsv3.config.plain_settings import Settings, put, value_of
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


def upgrade(settings: Settings, current: DictConfig | None = None) -> None:
    """Give the settings of an older run, as they were read, today's keys and values.

    current: where it is given, a part that older versions had none of is as it is there.
    """
    for part in ("reward", "objective", "callbacks", "callbacks.rollouts"):
        todays = OmegaConf.select(current, part) if current is not None else None
        if todays is not None and value_of(settings, part) is None:
            put(settings, part, OmegaConf.to_container(todays, resolve=True))
    _upgrade_logger(settings)
    if isinstance(run := settings.get("run"), dict):
        settings["run"] = {"init_partly": False, "freeze": []} | run
    for key, now in MOVED.items():
        _move(settings, key, now)
    _upgrade_data(settings)
    for key in VALUES:
        if (value := value_of(settings, key)) is not None:
            put(settings, key, todays_value(key, value))


def _upgrade_logger(settings: Settings) -> None:
    """There was one logger without a name, or a function that made none."""
    logger = settings.get("logger")
    if isinstance(logger, dict) and (target := logger.get("_target_")) is not None:
        name = "wandb" if str(target).endswith(".wandb_logger") else "own"
        settings["logger"] = {} if target == "plugins.logger.none.no_logger" else {name: logger}


def _upgrade_data(settings: Settings) -> None:
    """Settings of data whose rows were shuffled within windows: they are scored on what they held out, by that rule."""
    data = settings.get("data")
    if isinstance(data, dict) and data.pop("shuffle_window", None) is not None:
        limits = {"held_out_bytes": 32_000_000, "max_document_bytes": 256_000_000, "processes": None}
        settings["data"] = limits | data | {"packing": OLDER_PACKING}


def _move(settings: Settings, key: str, now: str) -> None:
    parent, _, name = key.rpartition(".")
    holder = value_of(settings, parent) if parent else settings
    if not isinstance(holder, dict) or name not in holder:
        return
    value = holder.pop(name)
    if not holder and parent in settings:  # nothing but old keys stood there
        del settings[parent]
    put(settings, now, value)
