"""Does a logger keep to `dsv3.contracts.LoggerFactory`?"""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger

from dsv3.testing.requirement import require

METRICS = {"tokens": 1024, "train/loss": 2.5, "train/bpb": float("nan"), "max_violation/layers.1": 0.25}


def check_logger(factory: Callable[..., Any]) -> None:
    """Raise AssertionError, saying what is wrong, unless `factory(save_dir=)` is a logger that the core can use."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for run in ("a new run", "a resumed run"):
            made = factory(save_dir=folder)
            if made is False:
                continue
            loggers = made if isinstance(made, list) else [made]
            for logger in loggers:
                require(
                    isinstance(logger, Logger),
                    f"the factory must give a Lightning Logger, a list of them, or False for none; not {logger!r}",
                )
                _use(logger, run)


def _use(logger: Logger, run: str) -> None:
    calls: dict[str, Callable[[], Any]] = {
        "log_metrics(metrics)": lambda: logger.log_metrics(dict(METRICS)),
        "log_metrics(metrics), again": lambda: logger.log_metrics(METRICS | {"tokens": 2048}),
        "save()": logger.save,
        'finalize("success")': lambda: logger.finalize("success"),
    }
    for name, call in calls.items():
        try:
            call()
        except Exception as error:
            raise AssertionError(
                f"{name} of {run} must work without more than numbers by name (no step; NaN occurs), and fails: "
                f"{type(error).__name__}: {error}"
            ) from error
