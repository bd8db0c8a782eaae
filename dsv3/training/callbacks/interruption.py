"""Ctrl-C and SIGTERM: finish the step, save a checkpoint, exit. A second signal stops immediately."""

import functools
import logging
import signal
from types import FrameType
from typing import Any

import lightning

from dsv3.contracts import Step
from dsv3.distributed.agree import several
from dsv3.training.callbacks.phases import Phase, find
from dsv3.training.lightning_module import LanguageModel

log = logging.getLogger(__name__)


def interrupted(trainer: lightning.Trainer) -> bool:
    """Whether a signal has asked the run to stop."""
    interruption = find(trainer, Interruption)
    return interruption is not None and interruption.happened


class Interruption(lightning.Callback):
    """Notes the first SIGINT or SIGTERM during training and asks the Trainer to stop after the step.

    A signal that one of several ranks was sent stops all of them after the same step: it travels with the step's sums.
    """

    phase: Phase = "interrupt"

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None  # on which this run stops, on all its ranks
        self.noted: signal.Signals | None = None  # what this process was sent
        self.previous: dict[signal.Signals, Any] = {}

    @property
    def happened(self) -> bool:
        return self.signal is not None

    @property
    def exit_status(self) -> int:
        """128 + the signal's number, as shells report it; 0 if there was none."""
        return 128 + self.signal if self.signal else 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module: LanguageModel) -> None:
        def note(number: int, frame: FrameType | None) -> None:
            self.noted = signal.Signals(number)
            self._restore()
            name = self.noted.name
            log.warning("%s received: finishing this step and saving a checkpoint; send it again to stop now", name)

        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, note)
            if several():
                pl_module.flags[f"signal/{int(number)}"] = functools.partial(self._is_noted, number)

    def _is_noted(self, number: signal.Signals) -> bool:
        return self.noted == number

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: LanguageModel, outputs: Any, batch: Step, batch_idx: int
    ) -> None:
        if several():
            agreed = sorted(name for name in pl_module.raised if name.startswith("signal/"))
            self.signal = signal.Signals(int(agreed[0].partition("/")[2])) if agreed else None
        else:
            self.signal = self.noted
        if self.happened:
            trainer.should_stop = True

    def teardown(self, trainer: lightning.Trainer, pl_module: LanguageModel, stage: str) -> None:
        self._restore()

    def on_exception(self, trainer: lightning.Trainer, pl_module: LanguageModel, exception: BaseException) -> None:
        self._restore()  # `teardown` is not called

    def _restore(self) -> None:
        for number in self.previous:
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        self.previous = {}
