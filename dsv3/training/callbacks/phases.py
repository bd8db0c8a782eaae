"""The order in which callbacks act within a step, and how one finds another."""

from collections.abc import Iterable
from typing import Literal, Protocol, TypeVar, get_args, runtime_checkable

import lightning

from dsv3.model.decoder import Decoder

Phase = Literal["interrupt", "guard", "average", "record", "observe", "evaluate", "save", "show"]
"""When a callback acts, as its attribute `phase`; those without one (any callback of Lightning's) observe.

    interrupt   signals            average   averaged weights      observe    monitoring
    guard       the update         record    tables and loggers    evaluate   held-out text and benchmarks
    save        the checkpoint, which holds the state of all callbacks before it
    show        what only displays
"""

PHASES: tuple[Phase, ...] = get_args(Phase)


@runtime_checkable
class ChecksModel(Protocol):
    """What a callback may offer: a check before the run folder is touched."""

    def check_model(self, model: Decoder) -> None:
        """Raise ValueError, naming the key, where the callback does not fit the model (on the meta device)."""


C = TypeVar("C", bound=lightning.Callback)


def in_order(callbacks: Iterable[lightning.Callback]) -> list[lightning.Callback]:
    """Sorted by phase; within a phase as they come.

    Raises:
        ValueError: a callback declares a phase that there is not.
    """

    def place(callback: lightning.Callback) -> int:
        phase = getattr(callback, "phase", "observe")
        if phase not in PHASES:
            raise ValueError(f"{type(callback).__name__}.phase={phase}: must be one of {', '.join(PHASES)}")
        return PHASES.index(phase)

    return sorted(callbacks, key=place)


def find(trainer: lightning.Trainer, kind: type[C]) -> C | None:
    """The run's callback of this class; None where the configuration leaves it out."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)  # type: ignore[attr-defined]
