"""Checkpoints every so many tokens, on interruption and at the end; written beside and renamed."""

from typing import Any

import lightning

from dsv3.checkpoint.run_folder import RunFolder, write_atomically
from dsv3.training.callbacks.interruption import Interruption
from dsv3.training.callbacks.intervals import crossed


class SaveCheckpoints(lightning.Callback):
    """After all that write in a step: flushes the tables (every `flush_tokens` too, for those who watch), then saves
    everything that training depends on."""

    def __init__(
        self, *, every_tokens: int, flush_tokens: int, keep: int, folder: RunFolder, interruption: Interruption
    ) -> None:
        if keep < 1:
            raise ValueError(f"run.keep_checkpoints={keep}: at least 1")
        self.every_tokens = every_tokens
        self.flush_tokens = flush_tokens
        self.keep = keep
        self.folder = folder
        self.interruption = interruption

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        due = crossed(self.every_tokens, batch.tokens_before, pl_module.tokens_seen)
        if due or pl_module.finished or self.interruption.happened:
            self.save(trainer, pl_module.tokens_seen)
        elif crossed(self.flush_tokens, batch.tokens_before, pl_module.tokens_seen):
            self.folder.flush(pl_module.tokens_seen)

    def save(self, trainer: lightning.Trainer, tokens: int) -> None:
        self.folder.flush(tokens)
        write_atomically(self.folder.checkpoint_path(tokens), trainer.save_checkpoint)
        for old in self.folder.checkpoints()[: -self.keep]:
            old.unlink()
