"""Ctrl-C and SIGTERM: finish the step, save a checkpoint, exit. A second signal stops immediately."""

import logging
import signal
from types import FrameType
from typing import Any

import lightning

from dsv3.contracts import Step
from dsv3.training.callbacks.phases import Phase, find
from dsv3.training.lightning_module import LanguageModel

log = logging.getLogger(__name__)


def interrupted(trainer: lightning.Trainer) -> bool:
    """Whether a signal has asked the run to stop."""
    interruption = find(trainer, Interruption)
    return interruption is not None and interruption.happened


class Interruption(lightning.Callback):
    """Notes the first SIGINT or SIGTERM during training and asks the Trainer to stop after the step."""

    phase: Phase = "interrupt"

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
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
            self.signal = signal.Signals(number)
            self._restore()
            name = self.signal.name
            log.warning("%s received: finishing this step and saving a checkpoint; send it again to stop now", name)

        for number in (signal.SIGINT, signal.SIGTERM):
            self.previous[number] = signal.signal(number, note)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, pl_module: LanguageModel, outputs: Any, batch: Step, batch_idx: int
    ) -> None:
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
