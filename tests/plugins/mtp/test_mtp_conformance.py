"""Every shipped MTP passes `check_mtp`; MTP with one fault each does not."""

import pytest
import torch

from dsv3.contracts import Statistic
from dsv3.testing.mtp import check_mtp
from plugins.mtp.deepseek import DeepSeekMTP
from plugins.mtp.none import NoMTP

DIM = 8


class Good(DeepSeekMTP):
    def __init__(self, *, block, precision, **changes):
        settings = {
            "dim": DIM, "norm_eps": 1e-6, "depth": 2, "concat": "embedding_hidden", "after_final_norm": True,
            "document_boundary": "mask", "weight": lambda tokens: 0.3, "block": block, "precision": precision,
        }  # fmt: skip
        super().__init__(**(settings | changes))


@pytest.mark.parametrize(
    "changes",
    [{}, {"depth": 1}, {"document_boundary": "cross"}, {"concat": "hidden_embedding", "after_final_norm": False}],
)
def test_deepseeks_mtp_conforms(changes):
    check_mtp(lambda **given: Good(**given, **changes), dim=DIM)


def test_none_conforms():
    check_mtp(NoMTP, dim=DIM)


class NoFlag(Good):
    def __init__(self, **given):
        super().__init__(**given)
        self.after_final_norm = None


class Overweight(Good):
    def __init__(self, **given):
        super().__init__(**given, weight=lambda tokens: 1 - tokens / 1000)


class OneCache(Good):
    def new_caches(self, rows=()):
        return super().new_caches(rows)[:1]


class NoLoss(NoMTP):
    depth = 1

    def new_caches(self, rows=()):
        return [None]


class OnePrediction(Good):
    def forward(self, *given):
        return super().forward(*given)[:1]


class Unrouted(Good):
    def forward(self, *given):
        return [prediction._replace(routing=None) for prediction in super().forward(*given)]


class Unnumbered(Good):
    """The second depth is another attribute, and has no number of its own."""

    def __init__(self, **given):
        super().__init__(**given)
        first, second = self.depths
        del self.depths
        self.first, self.second = torch.nn.ModuleList([first]), torch.nn.ModuleList([second])

    @property
    def depths(self):
        return [*self.first, *self.second]


class ReadsValues(Good):
    def __init__(self, **given):
        super().__init__(**given)
        self.scale = float(self.depths[0].norm.weight.detach().mean())


class Padded(Good):
    def forward(self, *given):
        pad = torch.nn.functional.pad
        return [
            p._replace(hidden_BSD=pad(p.hidden_BSD, (0, 0, 0, k + 1))) for k, p in enumerate(super().forward(*given))
        ]


class Unshifted(Good):
    def _targets(self, batch, k):
        return batch.targets_BT[:, : batch.targets_BT.shape[1] - k]


class LearnsPadding(Good):
    def _targets(self, batch, k):
        return super()._targets(batch, k).clamp(min=0)


class Cheats(Good):
    """Shows every position the token that it predicts."""

    def forward(self, h_BTD, batch, embed, isolate):
        h_BTD = h_BTD + torch.nn.functional.pad(embed(batch.tokens_BT[:, 2:]), (0, 0, 0, 2))
        return super().forward(h_BTD, batch, embed, isolate)


class ReadsNoToken(Good):
    def forward(self, h_BTD, batch, embed, isolate):
        return super().forward(h_BTD, batch, lambda tokens: torch.ones_like(embed(tokens)), isolate)


class Crosses(Good):
    def forward(self, h_BTD, batch, embed, isolate):
        return super().forward(h_BTD, batch, embed, False)


class NormedTwice(Good):
    def extend(self, depth, *given):
        _, hidden_BTD = super().extend(depth, *given)
        return hidden_BTD, hidden_BTD * 1.5


class CarriesHidden(Good):
    def extend(self, depth, *given):
        _, hidden_BTD = super().extend(depth, *given)
        return 1 - hidden_BTD, hidden_BTD


class Undivided(Good):
    def auxiliary_loss(self, forward, head, micro, denominators, tokens_seen):
        return super().auxiliary_loss(forward, head, micro, {"mtp": torch.tensor(1.0)}, tokens_seen)


class Unsummed(Good):
    def __init__(self, **given):
        super().__init__(**given)
        self.statistics = [Statistic("mtp_loss", "nats per token", "mtp_nll", over="mtp")]


class KeepsGraph(Good):
    def auxiliary_loss(self, *given):
        term = super().auxiliary_loss(*given)
        return term._replace(sums=dict.fromkeys(term.sums, term.loss))


class Frozen(Good):
    def auxiliary_loss(self, forward, head, *given):
        return super().auxiliary_loss(forward, head._replace(weight_VD=head.copy_VD), *given)


@pytest.mark.parametrize(
    ("mtp", "words"),
    [
        (NoFlag, "`after_final_norm` must be"),
        (Overweight, r"`weight\(1000000000\)` must be"),
        (OneCache, "one cache for each of 2 depths"),
        (NoLoss, "HasAuxiliaryLoss"),
        (OnePrediction, "one prediction must be given for each of 2"),
        (Padded, "are cut off"),
        (Unrouted, "`routing` must be that of the block's MoE"),
        (Unnumbered, r"are \['mtp.0', 'mtp.0'\]"),
        (ReadsValues, "on torch's meta device"),
        (Unshifted, r"the target of position i must be t_\(i\+1\+1\)"),
        (LearnsPadding, "IGNORE where the batch has none"),
        (Cheats, "tokens up to i . 1"),
        (ReadsNoToken, r"must read the token t_\(i\+1\)"),
        (Crosses, "with `isolate`"),
        (NormedTwice, "depth 1: extend"),
        (CarriesHidden, "depth 2: extend"),
        (Undivided, r"divided by denominators\[\"mtp\"\]"),
        (Unsummed, "made of 'mtp_nll'"),
        (KeepsGraph, "without a gradient"),
        (Frozen, "the head's weight must get a gradient"),
    ],
)
def test_faulty_mtp_is_found(mtp, words):
    with pytest.raises(AssertionError, match=words):
        check_mtp(mtp, dim=DIM)
