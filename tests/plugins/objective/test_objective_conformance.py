"""Every shipped objective passes `check_objective`; objectives with one fault each do not."""

from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from dsv3.contracts import IGNORE, Forward, LossTerm, Prompt, Statistic, Step
from dsv3.testing.objective import check_objective
from dsv3.testing.small_model import micro_batch
from plugins.objective.pretraining import Pretraining

CONF = Path(__file__).parents[3] / "conf"


def pairs() -> Step:
    """Eight rows of two or four replies, each after a prompt."""
    rows = micro_batch(8, 24, seed=0)
    numbers = torch.arange(24).expand(8, -1)
    ids_BT = 1 + numbers // torch.tensor([12, 6]).repeat(4).unsqueeze(1)
    targets_BT = rows.tokens_BT.roll(-1, 1).masked_fill(numbers % 6 < 2, IGNORE)
    return Step([rows._replace(document_ids_BT=ids_BT, targets_BT=targets_BT, positions_BT=numbers % 6)], 0, {})


def prompts() -> Step:
    return Step([], 0, {}, prompts=[Prompt([1, 2, 3], "abc", {}, 7)])


class Vowels:
    """A reward that random texts earn unlike amounts of."""

    def __call__(self, answers):
        return [float(sum(letter in "aeiou" for letter in answer.text)) for answer in answers]


STEPS = {"dpo": pairs, "grpo": prompts, "distill": prompts}
SAMPLING = {"seed": 1, "sequence_length": 24, "micro_batch_size": 8, "max_tokens": 20}
"""Eight answers, each of which has a row of its own."""
SETTINGS = {"grpo": {**SAMPLING, "reward": {"_target_": f"{__name__}.Vowels"}}, "distill": {**SAMPLING, "samples": 8}}


def factory_of(name, **settings):
    config = OmegaConf.merge(OmegaConf.load(CONF / "objective" / f"{name}.yaml"), SETTINGS.get(name, {}), settings)
    return instantiate(config, _convert_="all")


@pytest.mark.parametrize(
    ("name", "settings"),
    [(path.stem, {}) for path in sorted((CONF / "objective").glob("*.yaml"))]
    + [
        ("sft", {"weighting": "conversation"}),
        ("dpo", {"loss": "ipo", "nll": 0.0}),
        ("dpo", {"loss": "length_normalised", "label_smoothing": 0.1}),
        ("grpo", {"advantage": "mean_std", "denominator": "tokens", "kl": 0.1}),
        ("grpo", {"denominator": "sequence", "off_policy_mask": 0.5}),
        ("distill", {"direction": "forward"}),
    ],
    ids=str,
)
def test_shipped_objectives_conform(name, settings):
    check_objective(factory_of(name, **settings), step=STEPS[name]() if name in STEPS else None)


class Trained(Pretraining):
    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.temperature = nn.Parameter(torch.ones(()))


class Renamed(Pretraining):
    statistics = (Statistic("nll", "nats per token", "nll", over="targets"),)


class Twice(Pretraining):
    statistics = (Pretraining.statistics[0], Pretraining.statistics[0])


class Forgets(Pretraining):
    def prepare(self, step, models):
        return None


class NoMTPShare(Pretraining):
    def denominators(self, step):
        return {name: value for name, value in super().denominators(step).items() if name != "mtp"}


class AtLeastOne(Pretraining):
    """Two ranks, of which one has only padding, would divide by one too many."""

    def denominators(self, step):
        return {name: value.clamp(min=1) for name, value in super().denominators(step).items()}


class Numbers(Pretraining):
    def denominators(self, step):
        return {name: value.item() for name, value in super().denominators(step).items()}


class CountsTokens(Pretraining):
    def denominators(self, step):
        return {**super().denominators(step), "tokens": torch.tensor(8)}


class MeanOfMicroBatch(Pretraining):
    """Divides by the targets of the micro-batch, as F.cross_entropy does by default."""

    def loss(self, forward, head, micro, denominators):
        term = super().loss(forward, head, micro, denominators)
        real = (micro.targets_BT != IGNORE).sum()
        return term._replace(loss=term.loss * denominators["targets"] / real)


class MeanSum(Pretraining):
    def loss(self, forward, head, micro, denominators):
        term = super().loss(forward, head, micro, denominators)
        return term._replace(sums={"nll": term.sums["nll"] / len(micro.tokens_BT)})


class KeepsGraph(Pretraining):
    def loss(self, forward, head, micro, denominators):
        term = super().loss(forward, head, micro, denominators)
        return term._replace(sums={"nll": term.loss})


class Unsummed(Pretraining):
    def loss(self, forward, head, micro, denominators):
        return LossTerm(super().loss(forward, head, micro, denominators).loss, {})


class FrozenHead(Pretraining):
    def loss(self, forward, head, micro, denominators):
        return super().loss(forward, head._replace(weight_VD=head.copy_VD), micro, denominators)


class FrozenModel(Pretraining):
    def loss(self, forward, head, micro, denominators):
        return super().loss(Forward(forward.hidden_BTD.detach(), [], {}), head, micro, denominators)


class PenalisesPadding(Pretraining):
    def loss(self, forward, head, micro, denominators):
        term = super().loss(forward, head, micro, denominators)
        return term._replace(loss=term.loss + forward.hidden_BTD.square().sum() / denominators["mtp"])


class LooksAtPadding(Pretraining):
    def loss(self, forward, head, micro, denominators):
        term = super().loss(forward, head, micro, denominators)
        return term._replace(sums={"nll": term.sums["nll"] + forward.hidden_BTD.detach().square().sum()})


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (Trained, "has no parameters"),
        (Renamed, "must be called loss"),
        (Twice, "different names"),
        (Forgets, "the Step to train on, not NoneType"),
        (AtLeastOne, "of padding alone must be 0"),
        (NoMTPShare, "must give `mtp`"),
        (Numbers, "scalar tensor without a gradient"),
        (CountsTokens, "must not give `tokens`"),
        (MeanOfMicroBatch, "divide by the denominators that are given"),
        (MeanSum, "'nll' must add up"),
        (KeepsGraph, "kept for the whole step"),
        (Unsummed, "the statistic loss is made of 'nll'"),
        (FrozenHead, "arrives at the head's weight"),
        (FrozenModel, "arrives at the hidden states"),
        (PenalisesPadding, "must get no gradient"),
        (LooksAtPadding, "must have no part in nll"),
    ],
)
def test_faulty_objectives_are_found(objective, words):
    with pytest.raises(AssertionError, match=words):
        check_objective(objective)
