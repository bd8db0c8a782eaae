"""Watchdog of a run with several ranks: names a hang by the stack of each rank, and ends the run."""

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import lightning
import torch.distributed as dist

from dsv3.bounds import PositiveFloat
from dsv3.checkpoint.run_folder import write_text_atomically
from dsv3.distributed.agree import rank, several
from dsv3.training.callbacks.phases import Phase
from dsv3.training.frozen import Alarm, name_frozen
from dsv3.training.lightning_module import LanguageModel
from dsv3.training.on_end import call

BUSY = "watchdog/busy"
"""In the store of the process group: the number of ranks whose callbacks are at work."""

TO_WRITE, TO_WAIT = 2.0, 4.0
"""Seconds from a rank's report to its end. A rank that waits for others ends later: the launcher names the first."""

LATE = 2.0
"""Seconds by which a rank reports later where no thread of it can run: below `TO_WAIT`."""

INNERMOST = 4
"""Frames of a stack, one of which is torch.distributed's where a rank waits for others."""


class Watchdog(lightning.Callback):
    """A thread that measures how long this rank has been waiting for data or taking a step.

    After `seconds` it writes the stacks of this process to stderr and to `failure-rank<r>.txt` in the run folder, calls
    `run.on_end` on rank 0, and ends the process with status 1. Where the thread cannot run, an alarm ends it, without
    that call (`dsv3.training.frozen`). While callbacks are at work, on this rank or another one that the step waits
    for, time does not count: evaluation, benchmarks and checkpoints take as long as they take.

    seconds: None: nothing is watched, nor is it in one process.
    """

    phase: Phase = "interrupt"

    def __init__(self, *, seconds: PositiveFloat | None) -> None:
        if seconds is not None and not seconds > 0:
            raise ValueError(f"callbacks.watchdog.seconds={seconds}: must be above 0, or null for no limit")
        self.seconds = seconds
        self.thread: threading.Thread | None = None
        self.ended = threading.Event()

    def on_train_start(self, trainer: lightning.Trainer, pl_module: LanguageModel) -> None:
        if self.seconds is not None and several():
            watch = _Watch(pl_module, self.seconds, self.ended)
            pl_module.moved = watch.set_alarm
            self.thread = threading.Thread(target=watch.run, name="watchdog", daemon=True)
            self.thread.start()

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module: LanguageModel) -> None:
        self._stop()

    def on_exception(self, trainer: lightning.Trainer, pl_module: LanguageModel, exception: BaseException) -> None:
        self._stop()  # one that has found a hang, which the end of another rank interrupts here, ends this process

    def _stop(self) -> None:
        self.ended.set()
        if self.thread is not None:
            self.thread.join()


class _Watch:
    """What the thread does."""

    def __init__(self, module: LanguageModel, seconds: float, ended: threading.Event) -> None:
        self.module, self.seconds, self.ended = module, seconds, ended
        assert dist.group.WORLD is not None
        self.store = dist.group.WORLD.get_group_store()
        self.is_announced = False
        self.alarm = Alarm(module.folder.path, rank())

    def run(self) -> None:
        try:
            with contextlib.suppress(dist.DistError):  # the store ends with the job
                self._watch()
                self._announce(False)
        finally:
            with self.alarm.lock:
                self.ended.set()
                self.alarm.close()

    def _watch(self) -> None:
        interval = min(1.0, self.seconds / 10)
        seen, since = "", time.monotonic()
        while not self.ended.wait(interval):
            now, found = time.monotonic(), self.module.at
            if found != seen:
                seen, since = found, now
            self._announce(not found and now - since > interval)
            if found and now - since > self.seconds / 2 and self.store.add(BUSY, 0) > 0:
                since = now
                self.set_alarm()  # which cannot ask whether others are busy
            if found and now - since > self.seconds:
                self._end(found)

    def set_alarm(self) -> None:
        """For where this process is. While callbacks are at work there is none."""
        with self.alarm.lock:
            if self.module.at and not self.ended.is_set():
                line = f"{self._line(self.module.at)}, where no thread of it could run"
                self.alarm.set(self.seconds + LATE, line)
            else:
                self.alarm.stop()

    def _line(self, at: str) -> str:
        return f"rank {rank()} has been {at} for over {self.seconds:g} s (callbacks.watchdog.seconds)"

    def _announce(self, is_busy: bool) -> None:
        """Tell the ranks that may wait for this one; those that are busy for a moment need not."""
        if is_busy != self.is_announced:
            self.store.add(BUSY, 1 if is_busy else -1)
            self.is_announced = is_busy

    def _end(self, at: str) -> None:
        self.alarm.stop()
        line = self._line(at)
        is_waiting = waits_for_others(sys._current_frames()[threading.main_thread().ident or 0])
        if is_waiting:
            line += ", waiting for other ranks"
        text = "\n".join([line, *stacks(), ""])
        print(text, file=sys.stderr, flush=True)
        folder = self.module.folder
        write_text_atomically(folder.path / f"failure-rank{rank()}.txt", text)
        time.sleep(TO_WAIT if is_waiting else TO_WRITE)
        name_frozen(folder)
        if not is_waiting or folder.failure() is None:
            write_text_atomically(folder.failure_path, f"{line}; its stack is in failure-rank{rank()}.txt\n")
        if rank() == 0 and self.module.config.run.on_end:
            call(list(self.module.config.run.on_end), folder.path.absolute(), "failed")
        os._exit(1)


def waits_for_others(frame: FrameType) -> bool:
    """Whether a stack, given by its innermost frame, ends in torch.distributed."""
    files = [Path(inner.f_code.co_filename) for inner, _ in list(traceback.walk_stack(frame))[:INNERMOST]]
    return any(Path(dist.__file__).parent in file.parents for file in files)


def stacks() -> Iterator[str]:
    """Of every thread but this one, the main thread's first."""
    frames = sys._current_frames()
    threads = [thread for thread in threading.enumerate() if thread is not threading.current_thread()]
    for thread in sorted(threads, key=lambda thread: thread is not threading.main_thread()):
        if thread.ident in frames:
            yield f"\nthread {thread.name}:\n" + "".join(traceback.format_stack(frames[thread.ident]))
