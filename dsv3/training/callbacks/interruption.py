"""Ctrl-C, SIGTERM, SIGUSR1 and `trainer.max_time`: finish the step, save a checkpoint, exit.

A second signal stops immediately.
"""

import functools
import logging
import signal
import sys
import time
from types import FrameType
from typing import Any

import lightning

from dsv3.bounds import seconds_of
from dsv3.contracts import Step
from dsv3.distributed.agree import several
from dsv3.runtime import OUT_OF_TIME
from dsv3.training.callbacks.phases import Phase, find
from dsv3.training.lightning_module import LanguageModel

log = logging.getLogger(__name__)

TIME = "time"
"""In place of a signal's number, where `trainer.max_time` is over."""


def interrupted(trainer: lightning.Trainer) -> bool:
    """Whether a signal or the limit of time has asked the run to stop."""
    interruption = find(trainer, Interruption)
    return interruption is not None and interruption.happened


def leave(number: int, frame: FrameType | None) -> None:
    """SIGUSR1 where no step is under way that a checkpoint could follow: while data are prepared, or after training."""
    log.warning("SIGUSR1 received: stopping; the same command goes on")
    sys.exit(OUT_OF_TIME)


NOTED = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
OUTSIDE_TRAINING: dict[signal.Signals, Any] = {signal.SIGTERM: signal.SIG_DFL, signal.SIGUSR1: leave}
"""Handlers in place of those that Lightning sets; SIGINT gets its own back."""


class Interruption(lightning.Callback):
    """Notes the first SIGINT, SIGTERM or SIGUSR1 during training, or the end of `max_time`, and asks the Trainer to
    stop after the step. SIGUSR1 is what SLURM sends before a job's limit (`--signal=USR1@120`).

    What one of several ranks notes stops all of them after the same step: it travels with the step's sums.

    max_time: DD:HH:MM:SS from `began`, when the run was built first; rollbacks do not set it back. None: no limit.
    """

    phase: Phase = "interrupt"

    def __init__(self, *, max_time: str | None) -> None:
        try:
            self.max_seconds = None if max_time is None else seconds_of(max_time)
        except ValueError as error:
            raise ValueError(f"trainer.max_time={max_time}: {error}") from None
        self.began = time.monotonic()
        self.reason: str | None = None  # for which this run stops, on all its ranks: a signal's number, or TIME
        self.noted: signal.Signals | None = None  # what this process was sent
        self.previous: dict[signal.Signals, Any] = {}

    @property
    def happened(self) -> bool:
        return self.reason is not None

    @property
    def exit_status(self) -> int:
        """75 where the time is up; else 128 + the signal's number, as shells report it; 0 if nothing happened."""
        if self.reason is None:
            return 0
        return OUT_OF_TIME if self.reason in (TIME, str(int(signal.SIGUSR1))) else 128 + int(self.reason)

    def on_train_start(self, trainer: lightning.Trainer, pl_module: LanguageModel) -> None:
        def note(number: int, frame: FrameType | None) -> None:
            self.noted = signal.Signals(number)
            self._restore()
            name = self.noted.name
            log.warning("%s received: finishing this step and saving a checkpoint; send it again to stop now", name)

        for number in NOTED:
            self.previous[number] = signal.signal(number, note)
        if several():
            reasons = [str(int(number)) for number in NOTED] + [TIME] * (self.max_seconds is not None)
            for reason in reasons:
                pl_module.flags[f"stop/{reason}"] = functools.partial(self._is_noted, reason)

    def _is_noted(self, reason: str) -> bool:
        return reason == self._noted()

    def _noted(self) -> str | None:
        """Why this rank would stop."""
        if self.noted is not None:
            return str(int(self.noted))
        is_over = self.max_seconds is not None and time.monotonic() - self.began >= self.max_seconds
        return TIME if is_over else None

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: LanguageModel, outputs: Any, batch: Step, batch_idx: int
    ) -> None:
        if several():
            agreed = sorted(name for name in pl_module.raised if name.startswith("stop/"))
            self.reason = agreed[0].partition("/")[2] if agreed else None
        else:
            self.reason = self._noted()
        if self.reason == TIME and pl_module.finished:
            self.reason = None  # nothing is left to go on with
        if self.reason == TIME:
            log.warning("trainer.max_time is over: saving a checkpoint")
        if self.happened:
            trainer.should_stop = True

    def teardown(self, trainer: lightning.Trainer, pl_module: LanguageModel, stage: str) -> None:
        self._restore()

    def on_exception(self, trainer: lightning.Trainer, pl_module: LanguageModel, exception: BaseException) -> None:
        self._restore()  # `teardown` is not called

    def _restore(self) -> None:
        for number, before in self.previous.items():
            signal.signal(number, OUTSIDE_TRAINING.get(number, before))
        self.previous = {}
