"""Fixtures that many tests share, and what is set up once in each process that runs tests."""

import copy
import gc
import logging
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import hypothesis
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from tests.conftest import ROOT
from tests.once import configs_are_composed_once, configs_are_merged_once, configs_are_read_once
from tests.synthetic import TARGETS

hypothesis.settings.register_profile("unhurried", deadline=None)  # a busy machine is no failure
hypothesis.settings.load_profile("unhurried")
configs_are_read_once()
configs_are_merged_once()
configs_are_composed_once()


@pytest.fixture(scope="session")
def composed() -> Callable[..., DictConfig]:
    """compose(*overrides): the tiny model on synthetic data, unless the overrides say otherwise."""

    def build(*overrides: str) -> DictConfig:
        folder = [override.removeprefix("run.dir=") for override in overrides if override.startswith("run.dir=")]
        config = copy.deepcopy(_composed(tuple(o for o in overrides if not o.startswith("run.dir="))))
        if folder:  # another in each test, so that it is left out of what is composed once
            (config.run.dir,) = folder
        return config

    return build


@cache
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    base = [f"hydra.searchpath=[file://{ROOT}/tests/conf]", "model=tiny", "data=synthetic", "tokenizer=bytes"]
    base.append("precision=bf16")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        base.append(f"allow=[{','.join(TARGETS)}]")
        return compose("train", overrides=[*base, "logger=none", "benchmarks=none", "run.tokens=5120", *overrides])


@pytest.fixture(autouse=True, scope="session")
def imports_are_frozen() -> Iterator[None]:
    """What set_up_process does for a run, once for all runs of this process: each would keep the garbage before it."""
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        rest = {"get_threshold": gc.get_threshold, "set_threshold": gc.set_threshold}
        patch.setattr("dsv3.runtime.gc", SimpleNamespace(collect=lambda: 0, freeze=lambda: None, **rest))
        yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def process_is_left_as_found() -> Iterator[None]:
    """A command that a test calls in this process changes nothing for the next test."""
    folder, arguments = Path.cwd(), sys.argv[:]
    threads, seeds = torch.get_num_threads(), (torch.get_rng_state(), random.getstate(), np.random.get_state())
    loggers = [logging.getLogger(name) for name in (None, "lightning.pytorch", "lightning.fabric")]
    levels, handlers = [logger.level for logger in loggers], [logger.handlers[:] for logger in loggers]
    signals = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    yield
    os.chdir(folder)
    sys.argv[:] = arguments
    torch.set_num_threads(threads)
    torch.set_rng_state(seeds[0])
    random.setstate(seeds[1])
    np.random.set_state(seeds[2])
    for logger, level, before in zip(loggers, levels, handlers, strict=True):
        logger.setLevel(level)
        for handler in set(logger.handlers) - set(before):
            logger.removeHandler(handler)
    for number, handler in signals.items():
        signal.signal(number, handler)
    GlobalHydra.instance().clear()
