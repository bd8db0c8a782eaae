"""Progress bar: the objective's metrics, held-out text, MaxVio of the worst layer, tokens/s, peak memory, time left.

Without a terminal, a line at intervals.
"""

import sys
import time
from typing import Any

import lightning
from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from dsv3.contracts import Step
from dsv3.distributed.rank_bytes import text_of_bytes
from dsv3.reporting.amounts import text_of_seconds
from dsv3.training.callbacks.phases import Phase, find
from dsv3.training.callbacks.record import Record
from dsv3.training.callbacks.validate import Validate
from dsv3.training.lightning_module import LanguageModel

SECONDS_BETWEEN_LINES = 20
BY_LAYER = "max_violation/"


class Progress(lightning.Callback):
    """Shows the figures that the objective marks as `shown`; writes to stderr."""

    phase: Phase = "show"

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self.bar: Bar | None = None
        self.last_line = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: LanguageModel) -> None:
        if self.console.is_terminal and pl_module.folder.writes:
            columns = (TextColumn("{task.percentage:3.0f}%"), BarColumn(20), TextColumn("{task.description}"))
            self.bar = Bar(*columns, console=self.console)
            self.task = self.bar.add_task("", total=pl_module.total_tokens, completed=pl_module.tokens_seen)
            self.bar.start()

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: LanguageModel, outputs: Any, batch: Step, batch_idx: int
    ) -> None:
        if not pl_module.folder.writes:
            return
        text = describe(trainer, pl_module)
        if self.bar is not None:
            self.bar.update(self.task, completed=pl_module.tokens_seen, description=text)
        elif time.monotonic() - self.last_line > SECONDS_BETWEEN_LINES:
            self.last_line = time.monotonic()
            share = pl_module.tokens_seen / pl_module.total_tokens
            print(f"{share:4.0%}  {pl_module.tokens_seen:,} tokens  {text}", file=sys.stderr, flush=True)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: LanguageModel) -> None:
        self.close()

    def on_exception(self, trainer: lightning.Trainer, pl_module: LanguageModel, exception: BaseException) -> None:
        self.close()

    def close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def describe(trainer: lightning.Trainer, pl_module: LanguageModel) -> str:
    """The latest step in one line."""
    figures = pl_module.record.figures
    parts = [f"{s.name} {figures[s.name]:.3f}" for s in pl_module.losses.statistics if s.shown]
    validate, record = find(trainer, Validate), find(trainer, Record)
    if validate is not None and validate.latest_bpb:
        parts.append("val bpb " + " ".join(f"{d} {v:.2f}" for d, v in validate.latest_bpb.items()))
    violations = {name.removeprefix(BY_LAYER): value for name, value in figures.items() if name.startswith(BY_LAYER)}
    if violations:
        worst = max(violations, key=lambda layer: violations[layer])
        parts.append(f"MaxVio {violations[worst]:.2f} in {worst}")
    if record is not None:
        parts.append(f"{record.tokens_per_second:,.0f} tokens/s")
        parts.append("peak " + ", ".join(f"{text_of_bytes(n)} {kind}" for kind, n in record.peak_memory.items()))
        parts.append(f"{text_of_seconds(record.seconds_left)} left")
    return "  ".join(parts)
