"""Keys that older versions had elsewhere: named in messages, and followed where an older run is read."""

from omegaconf import DictConfig, OmegaConf, open_dict

MOVED = {
    "guard": "callbacks.guard",
    "ema": "callbacks.ema",
    "monitor": "callbacks.monitor",
    "diagnostics.quantisation_tokens": "callbacks.quantisation.every_tokens",
}
"""Old key, or whole mapping -> where it is now."""


def moved(key: str) -> str | None:
    """Where an old key is now; None where the key is none of `MOVED`."""
    for old, new in MOVED.items():
        if key == old or key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    return None


def upgraded(old: DictConfig, current: DictConfig) -> DictConfig:
    """The config of an older run with today's keys; parts that there were none of are as in `current`."""
    config = OmegaConf.create(OmegaConf.to_container(old, resolve=True))
    assert isinstance(config, DictConfig)
    with open_dict(config):
        for part in ("objective", "callbacks"):
            if part not in config and part in current:
                config[part] = OmegaConf.create(OmegaConf.to_container(current[part], resolve=True))
        for key, target in MOVED.items():
            value = OmegaConf.select(config, key)
            if value is None:
                continue
            OmegaConf.update(config, target, value, merge=True)
            parent, _, name = key.rpartition(".")
            holder = OmegaConf.select(config, parent) if parent else config
            del holder[name]
            if parent and not holder:
                del config[parent]
    return config
