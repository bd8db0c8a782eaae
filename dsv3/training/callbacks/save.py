"""Checkpoints at intervals, on interruption and at the end; written atomically."""

from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from dsv3.bounds import PositiveInt
from dsv3.checkpoint.run_folder import delete_checkpoint, load_checkpoint, write_atomically
from dsv3.config.declared import CheckpointFormat
from dsv3.contracts import Step
from dsv3.distributed.save_folder import save_folder
from dsv3.training.callbacks.intervals import crossed
from dsv3.training.callbacks.phases import Phase
from dsv3.training.lightning_module import LanguageModel


class DirectIO(TorchCheckpointIO):
    """Writes next to the path; Lightning's way goes through TMPDIR, which may be smaller than a checkpoint.

    `storage_options` is the format, of a process that has every tensor whole.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options == "folder":
            save_folder(Path(path), checkpoint, {})
        else:
            write_atomically(Path(path), lambda temporary: torch.save(checkpoint, temporary))

    def load_checkpoint(self, path: Any, *arguments: Any, **settings: Any) -> dict[str, Any]:
        return load_checkpoint(path)


class SaveCheckpoints(lightning.Callback):
    """Flushes the tables (every `flush_tokens` too, for those who watch), then saves everything that training needs.

    The last step's checkpoint is written before the last evaluation, which may fail.

    every_tokens: tokens between checkpoints. format: `file`, gathered on the first rank, or `folder`, to which every
    rank writes. keep: number of checkpoints kept, the newest.
    """

    phase: Phase = "save"

    def __init__(
        self, *, every_tokens: PositiveInt, flush_tokens: PositiveInt, format: CheckpointFormat, keep: PositiveInt
    ) -> None:
        if keep < 1:
            raise ValueError(f"callbacks.save.keep={keep}: must be at least 1")
        self.every_tokens = every_tokens
        self.flush_tokens = flush_tokens
        self.format = format
        self.keep = keep
        self.saved_at: int | None = None  # tokens

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: LanguageModel, outputs: Any, batch: Step, batch_idx: int
    ) -> None:
        due = crossed(self.every_tokens, pl_module.record.tokens_before, pl_module.tokens_seen)
        if due or pl_module.finished or trainer.should_stop:
            self.save(trainer, pl_module)
        elif crossed(self.flush_tokens, pl_module.record.tokens_before, pl_module.tokens_seen):
            pl_module.folder.flush(pl_module.tokens_seen)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: LanguageModel) -> None:
        """Where a limit of the Trainer's, such as `limit_train_batches`, has ended training."""
        if pl_module.steps and self.saved_at != pl_module.tokens_seen:
            self.save(trainer, pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: LanguageModel) -> None:
        """Flush what the last evaluation wrote; a run that resumes from the last checkpoint evaluates again."""
        pl_module.folder.flush(pl_module.tokens_seen)

    def save(self, trainer: lightning.Trainer, pl_module: LanguageModel) -> None:
        folder, tokens = pl_module.folder, pl_module.tokens_seen
        folder.flush(tokens)
        self.saved_at = tokens
        trainer.save_checkpoint(folder.checkpoint_path(tokens), storage_options=self.format)
        for old in folder.checkpoints()[: -self.keep] if folder.writes else ():
            delete_checkpoint(old)
