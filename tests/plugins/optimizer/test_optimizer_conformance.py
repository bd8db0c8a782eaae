"""Every shipped optimiser passes `check_optimizer`; optimisers with one fault each do not."""

from functools import partial
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dsv3.testing.optimizer import check_optimizer
from plugins.optimizer.adamw import FusedAdamW, adamw
from plugins.optimizer.muon import Muon

CONF = Path(__file__).parents[3] / "conf"
SHIPPED = [("adamw", {}), ("adamw", {"moments_dtype": "bfloat16"}), ("muon", {})]


@pytest.mark.parametrize(("name", "changes"), SHIPPED)
def test_shipped_optimisers_conform(name, changes):
    config = OmegaConf.merge(OmegaConf.load(CONF / "optimizer" / f"{name}.yaml"), changes)
    check_optimizer(instantiate(config, _convert_="all"))


def test_every_shipped_optimiser_is_checked():
    assert {path.stem for path in (CONF / "optimizer").glob("*.yaml")} == {name for name, _ in SHIPPED}


good = partial(
    adamw, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, moments_dtype="float32", sparse_lr_scale=5.0
)  # fmt: skip


def test_the_good_optimiser_conforms():
    check_optimizer(good)


def forgets_norms(named):
    return good([(name, p) for name, p in named if p.ndim > 1])


def fixed_rate(named):
    """Ignores the groups' `lr`."""
    optimizer = good(named)
    step = optimizer.step

    def with_own_rate():
        for group in optimizer.param_groups:
            group["lr"] = 0.01
        step()

    optimizer.step = with_own_rate
    return optimizer


def ascends(named):
    optimizer = good(named)
    step = optimizer.step

    def upwards():
        for group in optimizer.param_groups:
            group["lr"] *= -1
        step()

    optimizer.step = upwards
    return optimizer


def dense_only(named):
    """Leaves sparse gradients out."""
    optimizer = good(named)
    step = optimizer.step

    def without_tables():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    parameter.grad = None
        step()

    optimizer.step = without_tables
    return optimizer


def decays_idle(named):
    """Decays what has no gradient."""
    optimizer = good(named)
    step = optimizer.step

    def decayed():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.data.mul_(1 - 0.1 * group["lr"])
        step()

    optimizer.step = decayed
    return optimizer


class Counting(FusedAdamW):
    """Keeps the number of its steps beside its state."""

    steps = 0

    def step(self, closure=None):
        self.steps += 1
        for group in self.param_groups:
            group["lr"] *= 1 + 1e-2 * self.steps
        return super().step(closure)


def unsaved(named):
    groups = [{"params": [p for _, p in named], "sparse_lr_scale": 5.0}]
    return Counting(groups, lr=0.0, fused=True)


class Unsafe(FusedAdamW):
    def state_dict(self):
        return {**super().state_dict(), "rule": partial(print)}


def unsafe(named):
    return Unsafe([{"params": [p for _, p in named], "sparse_lr_scale": 5.0}], lr=0.0, fused=True)


class Deaf(Muon):
    """Forgets what it is told of joined weights."""

    def separate(self, joined):
        pass


def joins(named):
    config = OmegaConf.load(CONF / "optimizer" / "muon.yaml")
    optimizer = instantiate(config, _convert_="all")(named)
    optimizer.__class__ = Deaf
    return optimizer


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        (joins, "must step as these matrices do by themselves"),
        (lambda named: list(named), "torch.optim.Optimizer"),
        (forgets_norms, "norm.weight is in 0 groups"),
        (lambda named: good([*named, ("more", torch.nn.Parameter(torch.zeros(2)))]), "that were not given"),
        (fixed_rate, "`lr` 0 must change nothing"),
        (ascends, "nearer to its target"),
        (dense_only, "sparse"),
        (decays_idle, "must be left alone"),
        (unsaved, "bit for bit"),
        (unsafe, "plain containers"),
    ],
)
def test_faulty_optimisers_are_found(factory, words):
    with pytest.raises(AssertionError, match=words):
        check_optimizer(factory)
