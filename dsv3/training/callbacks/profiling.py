"""`profile=true`: a trace of a few training steps and a table of the ten most expensive operations."""

import logging
import os
from typing import Any

import lightning
import torch
from torch.profiler import ProfilerActivity, profile

from dsv3.bounds import NonNegativeInt, PositiveInt
from dsv3.contracts import Step
from dsv3.training.callbacks.phases import Phase
from dsv3.training.lightning_module import LanguageModel

log = logging.getLogger(__name__)

ROWS = 10


class Profiling(lightning.Callback):
    """Runs torch.profiler over the steps after the first `skip_steps` of this process, which warm up.

    Writes `profile/trace.json.gz`, for chrome://tracing or ui.perfetto.dev, and `profile/operations.txt` to the run
    folder, of the first rank. What other callbacks do in these steps is not part of it.
    """

    phase: Phase = "interrupt"  # first to see the end of a step

    def __init__(self, *, enabled: bool, skip_steps: NonNegativeInt, steps: PositiveInt) -> None:
        self.enabled = enabled
        self.skip_steps = skip_steps
        self.steps = steps
        self.begun = 0  # steps of this process
        self.profiler: profile | None = None

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: LanguageModel, batch: Step, batch_idx: int
    ) -> None:
        if self.enabled and pl_module.folder.writes and self.begun == self.skip_steps:
            os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or the profiler writes of its own stages to stderr
            on_gpu = pl_module.device.type == "cuda"
            self.profiler = profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu])
            self.profiler.start()
        self.begun += 1

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: LanguageModel, outputs: Any, batch: Step, batch_idx: int
    ) -> None:
        if self.begun == self.skip_steps + self.steps:
            self._write(pl_module)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: LanguageModel) -> None:
        self._write(pl_module)
        if self.enabled and self.begun <= self.skip_steps:
            log.warning("profile=true: training ended within callbacks.profiling.skip_steps=%d", self.skip_steps)

    def on_exception(self, trainer: lightning.Trainer, pl_module: LanguageModel, exception: BaseException) -> None:
        self._write(pl_module)

    def _write(self, pl_module: LanguageModel) -> None:
        if self.profiler is None:
            return
        profiler, self.profiler = self.profiler, None
        if pl_module.device.type == "cuda":
            torch.cuda.synchronize()
        profiler.stop()
        folder = pl_module.folder.path / "profile"
        folder.mkdir(exist_ok=True)
        profiler.export_chrome_trace(str(folder / "trace.json.gz"))
        order = "self_cuda_time_total" if pl_module.device.type == "cuda" else "self_cpu_time_total"
        table = profiler.key_averages().table(sort_by=order, row_limit=ROWS, max_name_column_width=60)
        (folder / "operations.txt").write_text(table + "\n")
        log.info("profile of the steps to step %d: %s", pl_module.steps, folder)
