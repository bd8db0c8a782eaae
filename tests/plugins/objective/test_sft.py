"""Supervised fine-tuning against plain formulas, packed and unpacked."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dsv3.contracts import IGNORE, Forward, Head, MicroBatch, Step
from plugins.objective.sft import SFT

V, D, T = 50, 8, 20
BYTES = torch.arange(V) % 7


def conversations(seed: int) -> MicroBatch:
    """Three rows: of two conversations of unlike length, of one that has no target, of padding."""
    generator = torch.Generator().manual_seed(seed)
    tokens_BT = torch.randint(1, V, (3, T), generator=generator)
    ids_BT = torch.tensor([[1] * 6 + [2] * 11 + [0] * 3, [1] * T, [0] * T])
    targets_BT = torch.randint(1, V, (3, T), generator=generator)
    targets_BT[0, :3] = targets_BT[0, 6:9] = targets_BT[0, 17:] = targets_BT[1:] = IGNORE
    zeros = torch.zeros_like(tokens_BT)
    return MicroBatch(tokens_BT, targets_BT, zeros, ids_BT, zeros)


def taken(weighting: str, micros: list[MicroBatch], hidden: list[Tensor], weight_VD: Tensor) -> tuple[Tensor, Tensor]:
    """The step's loss, and its gradient for the head."""
    objective = SFT(token_bytes_V=BYTES, weighting=weighting)  # type: ignore[arg-type]
    weight_VD = weight_VD.clone().requires_grad_()
    denominators = objective.denominators(Step(micros, 0, {}))
    terms = [
        objective.loss(Forward(h_BTD, [], {}), Head(weight_VD, weight_VD.detach()), micro, denominators)
        for micro, h_BTD in zip(micros, hidden, strict=True)
    ]
    total = torch.stack([term.loss for term in terms]).sum()
    return total.detach(), torch.autograd.grad(total, weight_VD)[0]


@pytest.mark.parametrize("weighting", ["token", "conversation"])
def test_loss_of_packed_conversations_is_the_mean_over_them_alone(weighting: str) -> None:
    micro = conversations(0)
    hidden_BTD, weight_VD = torch.randn(3, T, D), torch.randn(V, D, requires_grad=True)
    found, gradient = taken(weighting, [micro], [hidden_BTD], weight_VD)
    means, sizes = [], []
    for number in (1, 2):
        own = (micro.document_ids_BT[0] == number) & (micro.targets_BT[0] != IGNORE)
        logits = hidden_BTD[0, own] @ weight_VD.T
        means.append(F.cross_entropy(logits, micro.targets_BT[0, own]))
        sizes.append(int(own.sum()))
    shares = [size / sum(sizes) for size in sizes] if weighting == "token" else [0.5, 0.5]
    expected = sum(share * mean for share, mean in zip(shares, means, strict=True))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, weight_VD)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weighting", ["token", "conversation"])
def test_one_micro_batch_and_four_give_the_same_gradient(weighting: str) -> None:
    micros = [conversations(seed) for seed in range(4)]
    hidden, weight_VD = [torch.randn(3, T, D) for _ in micros], torch.randn(V, D)
    joined = MicroBatch(*(torch.cat(tensors) for tensors in zip(*(micro.packed for micro in micros), strict=True)))
    for one, four in zip(
        taken(weighting, [joined], [torch.cat(hidden)], weight_VD),
        taken(weighting, micros, hidden, weight_VD),
        strict=True,
    ):
        torch.testing.assert_close(one, four, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weighting", ["token", "conversation"])
def test_a_step_with_no_target_has_loss_zero_and_no_nan(weighting: str) -> None:
    empty = conversations(0).padding()
    loss, gradient = taken(weighting, [empty], [torch.randn(3, T, D)], torch.randn(V, D))
    assert loss == 0
    assert not gradient.any()


def test_an_unknown_weighting_is_named() -> None:
    with pytest.raises(ValueError, match="weighting=turn"):
        SFT(token_bytes_V=BYTES, weighting="turn")  # type: ignore[arg-type]
