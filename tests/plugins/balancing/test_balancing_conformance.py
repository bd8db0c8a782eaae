"""Every shipped balancing method passes `check_balancing`; methods with one fault each do not."""

from functools import partial
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from dsv3.testing import check_balancing
from plugins.balancing.base import Unbalanced
from plugins.balancing.composed import Composed
from plugins.balancing.loss_free import LossFree
from plugins.balancing.sequence_aux import SequenceAux

CONF = Path(__file__).parents[3] / "conf"
SIZES = {"n_experts": 8, "top_k": 2}


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "balancing").glob("*.yaml")))
def test_shipped_methods_conform(name):
    root = OmegaConf.create(
        {
            "model": {"n_routed_experts": 8, "top_k": 2},
            "run": {"tokens": 1000},
            "balancing": OmegaConf.load(CONF / "balancing" / f"{name}.yaml"),
        }
    )
    check_balancing(instantiate(root.balancing), **SIZES)


class Good(LossFree):
    def __init__(self) -> None:
        super().__init__(n_experts=8, gamma=lambda _: 0.01, rule="sign", centred=False)


def test_the_good_method_conforms():
    check_balancing(Good, **SIZES)


class Castable(Good):
    def _apply(self, fn, recurse=True):
        return torch.nn.Module._apply(self, fn, recurse)


class CountsUnsaved(Good):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("counts", torch.zeros(8, dtype=torch.int64), persistent=False)


class ImmediateUpdate(Good):
    def observe(self, counts_E):
        super().observe(counts_E)
        self.update(0)


class NeverReset(Good):
    @torch.no_grad()
    def update(self, tokens_seen):
        kept = self.counts.clone()
        super().update(tokens_seen)
        self.counts.copy_(kept)


class WrongWay(Good):
    def observe(self, counts_E):
        super().observe(counts_E.max() - counts_E)


class DriftsIdle(Good):
    @torch.no_grad()
    def update(self, tokens_seen):
        super().update(tokens_seen)
        self.bias += 0.1


class LearnedBias(Unbalanced):
    def __init__(self) -> None:
        super().__init__(n_experts=8)
        del self.bias
        self.bias = torch.nn.Parameter(torch.zeros(8))


class LastOnly(Good):
    def observe(self, counts_E):
        self.counts.copy_(counts_E)


class CountsPadding(SequenceAux):
    def __init__(self) -> None:
        super().__init__(**SIZES, alpha=1.0)

    def loss(self, routing, batch_shape, mask_BT, tokens_seen):
        return super().loss(routing, batch_shape, torch.ones_like(mask_BT), tokens_seen)


class PerRow(Good):
    def loss(self, routing, batch_shape, mask_BT, tokens_seen):
        return routing.affinities_NE.sum(1)


class HalfLoss(Good):
    def loss(self, routing, batch_shape, mask_BT, tokens_seen):
        return super().loss(routing, batch_shape, mask_BT, tokens_seen).bfloat16()


class Singular(Good):
    def loss(self, routing, batch_shape, mask_BT, tokens_seen):
        return (routing.affinities_NE.detach() - routing.affinities_NE).abs().sqrt().sum()


class LossCounts(Good):
    @torch.no_grad()
    def loss(self, routing, batch_shape, mask_BT, tokens_seen):
        self.counts += 1
        return super().loss(routing, batch_shape, mask_BT, tokens_seen)


SHARED = Good()


@pytest.mark.parametrize(
    ("method", "words"),
    [
        (Castable, "must stay so"),
        (CountsUnsaved, "save the counts"),
        (ImmediateUpdate, "observe\\(\\) must not move the bias"),
        (NeverReset, "apply what was observed once"),
        (WrongWay, "overloaded"),
        (DriftsIdle, "nothing was observed"),
        (LearnedBias, "buffers"),
        (LastOnly, "count like one"),
        (CountsPadding, "padding"),
        (PerRow, "scalar"),
        (HalfLoss, "float32 scalar"),
        (Singular, "not finite"),
        (LossCounts, "change no state"),
        (partial(Composed, parts={"one": lambda: SHARED}), "share no state|zero before"),
    ],
)
def test_faulty_methods_are_found(method, words):
    with pytest.raises(AssertionError, match=words):
        check_balancing(method, **SIZES)
