"""The progress bar: loss, bits per byte, balance, tokens/s. Where there is no terminal, a line now and then."""

import sys
import time
from typing import Any

import lightning
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from dsv3.training.callbacks.record import Record
from dsv3.training.callbacks.validate import Validate

SECONDS_BETWEEN_LINES = 20


class Progress(lightning.Callback):
    """Reads what `Record` and `Validate` noted last; writes to stderr."""

    def __init__(self, *, total_tokens: int, record: Record, validate: Validate) -> None:
        self.total_tokens = total_tokens
        self.record = record
        self.validate = validate
        self.console = Console(stderr=True)
        self.bar: Bar | None = None
        self.last_line = 0.0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        if self.console.is_terminal:
            columns = (TextColumn("{task.percentage:3.0f}%"), BarColumn(20), TextColumn("{task.description}"))
            self.bar = Bar(*columns, TimeRemainingColumn(), console=self.console)
            self.task = self.bar.add_task("", total=self.total_tokens, completed=pl_module.tokens_seen)
            self.bar.start()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        text = self.describe()
        if self.bar is not None:
            self.bar.update(self.task, completed=pl_module.tokens_seen, description=text)
        elif time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            share = pl_module.tokens_seen / self.total_tokens
            print(f"{share:4.0%}  {pl_module.tokens_seen:,} tokens  {text}", file=sys.stderr, flush=True)

    def describe(self) -> str:
        latest = self.record.latest
        parts = [f"loss {latest['loss']:.3f}", f"bpb {latest['bpb']:.3f}"]
        if self.validate.latest_bpb:
            parts.append("held out " + " ".join(f"{d} {v:.2f}" for d, v in self.validate.latest_bpb.items()))
        violations = [value for key, value in latest.items() if key.startswith("max_violation/")]
        if violations:
            parts.append(f"max violation {sum(violations) / len(violations):.2f}")
        return "  ".join([*parts, f"{latest['tokens_per_second']:,.0f} tokens/s"])

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
