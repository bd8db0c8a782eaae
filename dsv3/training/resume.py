"""Resume policy for an existing run folder.

`resume=auto` resumes from the newest valid checkpoint, if the folder's config asks for the same training;
`resume=never` moves the old folder aside; a path resumes from that checkpoint, and when the same command is given
again, from where the run has come since.
"""

import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import nn

from dsv3.checkpoint.older_runs import refuse_damaged_parts
from dsv3.checkpoint.parts import tokens_of
from dsv3.checkpoint.run_config import read_config
from dsv3.checkpoint.run_folder import RunFolder, is_valid, load_checkpoint, write_atomically
from dsv3.config.moved import OLDER_PACKING
from dsv3.contracts import is_precision_state
from dsv3.training.settle import kept_choices

log = logging.getLogger(__name__)

FREE = (
    "resume",
    "allow",
    "engine",
    "run.dir",
    "run.name",
    "run.experiment",
    "run.keep_checkpoints",
    "run.checkpoint_format",
    "run.on_end",
    "profile",
    "study",
    "logger",
    "benchmarks",
    "trainer",
    "parallel",
    "dispatch",
    "data.cache_dir",
    "data.processes",
    "callbacks.guard.max_rollbacks",
    "callbacks.guard.max_nonfinite",
    *(f"callbacks.{name}" for name in ("interruption", "watchdog", "record", "benchmarks", "profiling")),
    *(f"callbacks.{name}" for name in ("save", "expert_plots", "progress")),
)
"""Keys that may change when a run resumes: none affects what is computed, but for rounding."""


def refuse_unusable(config: DictConfig, folder: RunFolder, model: nn.Module) -> Path | None:
    """Return what `prepare` will, if it will accept the folder; changes nothing, so that it may come before slow work.

    model: the one to train, or its shapes on the meta device.

    Raises:
        ValueError, FileNotFoundError: as `prepare`; or the checkpoint that `resume` names is of another model.
    """
    checkpoint = checkpoint_of(config, folder)
    if checkpoint is not None and config.resume != "auto":
        state = load_checkpoint(checkpoint, mmap=True)["state_dict"]
        saved = {key.removeprefix("model."): list(value.shape) for key, value in state.items()}
        for name, tensor in model.state_dict().items():
            if not is_precision_state(name) and saved.get(name) != list(tensor.shape):
                there = f"has {name} of shape {saved[name]}" if name in saved else f"has no {name}"
                raise ValueError(f"resume={config.resume}: another model: it {there}; here it is {list(tensor.shape)}")
    return checkpoint


def prepare(config: DictConfig, folder: RunFolder) -> Path | None:
    """Prepare the folder, write config.yaml, and return the checkpoint to resume from, or None to start.

    Raises:
        ValueError: the folder's run was trained with other settings, or none of its checkpoints can be used.
        FileNotFoundError: `resume` names a checkpoint that is missing or corrupt.
    """
    folder.hold()
    folder.clear_leftovers()
    if config.resume == "never" and folder.config_path.exists():
        log.warning("previous run moved to %s", folder.move_aside())
        folder.hold()
    checkpoint = checkpoint_of(config, folder)
    folder.drop_after(tokens_of(checkpoint) if checkpoint else -1)
    for ending in (folder.summary_path, folder.failure_path, *folder.path.glob("failure-rank*.txt")):
        ending.unlink(missing_ok=True)
    write_atomically(folder.config_path, lambda path: OmegaConf.save(config, path, resolve=True))
    return checkpoint


def checkpoint_of(config: DictConfig, folder: RunFolder) -> Path | None:
    """What `resume` asks for: the checkpoint to resume from, or None to start. Changes nothing; raises as `prepare`."""
    if config.resume == "never":
        return None
    if config.resume != "auto":
        return branch_point(config, folder)
    if folder.config_path.exists() and folder.begun():
        refuse_other_settings(config, folder)
    return newest_or_refuse(folder)


def newest_or_refuse(folder: RunFolder) -> Path | None:
    """The newest valid checkpoint; None in a folder without checkpoints.

    Raises:
        ValueError: there are some, and none is valid: starting over would delete what they may still hold. Or a table
            is damaged that the run would go on with.
    """
    checkpoint = folder.newest_valid_checkpoint()
    if checkpoint is None and (corrupt := folder.checkpoints()):
        raise ValueError(
            f"run.dir={folder.path}: none of its checkpoints can be used ({', '.join(path.name for path in corrupt)}). "
            "Restore one from a copy, or use resume=never to move the old run aside and start over."
        )
    if checkpoint is not None:
        refuse_damaged_parts(folder.path, tokens_of(checkpoint))
    return checkpoint


def branch_point(config: DictConfig, folder: RunFolder) -> Path | None:
    """The checkpoint that `resume=PATH` names, or where this folder's run, begun from it, has come since."""
    checkpoint = Path(config.resume)
    if not checkpoint.exists() or not is_valid(checkpoint):
        raise FileNotFoundError(f"resume={config.resume}: must be a valid checkpoint, tokens-<number>.ckpt")
    tokens_of(checkpoint)
    begun_from_it = folder.config_path.exists() and folder.config().get("resume") == config.resume
    return newest_or_refuse(folder) if begun_from_it and folder.checkpoints() else checkpoint


def is_finished(config: DictConfig, folder: RunFolder) -> bool:
    """Whether `resume=auto` has nothing left to do: the same training, summarised, to its length or step cap.

    Raises:
        ValueError: the folder's run was trained with other settings.
    """
    summary = folder.summary()
    if config.resume != "auto" or summary is None or not folder.config_path.exists():
        return False
    refuse_other_settings(kept_choices(config, folder), folder)
    cap = config.trainer.max_steps
    return summary["tokens"] >= config.run.tokens or (cap != -1 and summary["steps"] >= cap)


def refuse_other_settings(config: DictConfig, folder: RunFolder) -> None:
    before = read_config(folder.config_path, config)
    if OmegaConf.select(before, "data.packing") == OLDER_PACKING != OmegaConf.select(config, "data.packing"):
        raise ValueError(
            f"{folder.path} holds a run of an older version, which shuffled rows within windows (data.shuffle_window); "
            "that order cannot be continued. Choose another folder (run.name=...), or use resume=never to move the old "
            "run aside and start over."
        )
    changed = [
        f"{key}: {there} there, {now} now" for key, (there, now) in differences(before, config, free=FREE).items()
    ]
    if changed:
        raise ValueError(
            f"{folder.path} already holds a run with different settings:\n  "
            + "\n  ".join(changed)
            + "\nChoose another folder (run.name=...), or use resume=never to move the old run aside and start over."
        )


def differences(one: Any, other: Any, *, free: Collection[str]) -> dict[str, tuple[Any, Any]]:
    """Dotted keys in which two configs differ, with both values; `free` keys and what is below them may."""
    first, second = flat(one), flat(other)
    return {
        key: (first.get(key, "(absent)"), second.get(key, "(absent)"))
        for key in sorted(first.keys() | second.keys())
        if first.get(key) != second.get(key) and not any(key == name or key.startswith(f"{name}.") for name in free)
    }


def flat(config: Any) -> dict[str, Any]:
    """Dotted keys of the leaves of a nested config."""

    def leaves(node: Any, prefix: str) -> Iterator[tuple[str, Any]]:
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in items:
            if isinstance(value, dict | list) and value:
                yield from leaves(value, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", value

    return dict(leaves(OmegaConf.to_container(config, resolve=True), ""))
