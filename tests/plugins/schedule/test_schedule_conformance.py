"""Every shipped schedule passes `check_schedule`; schedules with one fault each do not."""

import itertools
import math
import random
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dsv3.testing.schedule import check_schedule

CONF = Path(__file__).parents[3] / "conf"
TOTAL = 1000


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "schedule").glob("*.yaml")))
def test_shipped_schedules_conform(name):
    root = OmegaConf.create({"run": {"tokens": TOTAL}, "schedule": OmegaConf.load(CONF / "schedule" / f"{name}.yaml")})
    check_schedule(lambda: instantiate(root.schedule, _convert_="all"), total_tokens=TOTAL)


def counting():
    calls = itertools.count()
    return lambda tokens: float(next(calls))


def latest():
    """Never falls: remembers the most tokens that it was asked for."""
    seen = [0]

    def value(tokens):
        seen.append(tokens)
        return float(max(seen))

    return value


def drawn():
    peak = random.random()
    return lambda tokens: peak


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (lambda: 1e-3, "is no function"),
        (lambda: lambda tokens: 1e-3 * (1 - tokens / TOTAL), "after 2000 tokens must be a finite number, at least 0"),
        (lambda: lambda tokens: math.inf if tokens == TOTAL else 0.0, "after 1000 tokens must be a finite number"),
        (lambda: lambda tokens: torch.tensor(0.1), "must be a finite number"),
        (counting, "in another order"),
        (latest, "in another order"),
        (drawn, "as a resumed run makes one"),
    ],
)
def test_faulty_schedules_are_found(factory, words):
    with pytest.raises(AssertionError, match=words):
        check_schedule(factory, total_tokens=TOTAL)
