"""Resume policy for an existing run folder.

`resume=auto` resumes from the newest valid checkpoint, if the folder's config asks for the same training;
`resume=never` moves the old folder aside; a path resumes from that checkpoint.
"""

import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from dsv3.checkpoint.run_folder import RunFolder, is_valid, tokens_of, write_atomically
from dsv3.config.moved import upgraded
from dsv3.training.settle import kept_choices

log = logging.getLogger(__name__)

FREE = (
    "resume",
    "run.dir",
    "run.name",
    "run.experiment",
    "run.keep_checkpoints",
    "study",
    "logger",
    "benchmarks",
    "trainer",
    "data.cache_dir",
    "callbacks.guard.max_rollbacks",
    "callbacks.guard.max_nonfinite",
    *(f"callbacks.{name}" for name in ("interruption", "record", "benchmarks", "save", "expert_plots", "progress")),
)
"""Keys that may change when a run resumes: none affects what is computed."""


def prepare(config: DictConfig, folder: RunFolder) -> Path | None:
    """Prepare the folder, write config.yaml, and return the checkpoint to resume from, or None to start.

    Raises:
        ValueError: the folder's run was trained with other settings.
        FileNotFoundError: `resume` names a checkpoint that is missing or corrupt.
    """
    folder.hold()
    if config.resume == "never":
        if folder.config_path.exists():
            log.warning("previous run moved to %s", folder.move_aside())
            folder.hold()
        checkpoint = None
    elif config.resume == "auto":
        if folder.config_path.exists() and folder.begun():
            refuse_other_settings(config, folder)
        checkpoint = folder.newest_valid_checkpoint()
    else:
        checkpoint = Path(config.resume)
        if not is_valid(checkpoint):
            raise FileNotFoundError(f"resume={config.resume}: must be auto, never or a valid checkpoint")
    folder.drop_after(tokens_of(checkpoint) if checkpoint else -1)
    for ending in (folder.summary_path, folder.failure_path):
        ending.unlink(missing_ok=True)
    write_atomically(folder.config_path, lambda path: OmegaConf.save(config, path, resolve=True))
    return checkpoint


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
    before = OmegaConf.load(folder.config_path)
    assert isinstance(before, DictConfig)
    changed = [
        f"{key}: {there} there, {now} now"
        for key, (there, now) in differences(upgraded(before, config), config, free=FREE).items()
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
