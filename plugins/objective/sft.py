"""Supervised fine-tuning: cross-entropy of the replies in conversations.

    weighting=token            L = sum over targets of -ln p(target) / number of targets
    weighting=conversation     L = mean over conversations of the mean over their targets of -ln p(target)

Sums and means are over the global batch, in nats. Targets are what the data trains on: the assistant's tokens and the
EOS that ends them. Rows hold whole conversations, isolated from each other.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from dsv3.contracts import IGNORE, Denominators, Forward, Head, LossTerm, MicroBatch, Models, Statistic, Step
from dsv3.model.losses import linear_cross_entropy, token_log_probs
from plugins.objective.documents import targets_of


class SFT(nn.Module):
    """Cross-entropy of the targets, by token or by conversation.

    token_bytes_V: bytes that each token stands for, int64 [V].
    """

    statistics = (
        Statistic("loss", "nats", "loss", shown=True),
        Statistic("nll", "nats per token", "nll", over="targets"),
        Statistic("bpb", "bits per byte", "nll", over="bytes", factor=1 / math.log(2), shown=True),
        Statistic("trained_fraction", "share of tokens", "trained", over="tokens"),
    )
    token_bytes_V: Tensor

    def __init__(self, *, token_bytes_V: Tensor, weighting: Literal["token", "conversation"]) -> None:
        super().__init__()
        if weighting not in ("token", "conversation"):
            raise ValueError(f"weighting={weighting}: must be token or conversation")
        self.by_conversation = weighting == "conversation"
        self.register_buffer("token_bytes_V", token_bytes_V, persistent=False)

    def prepare(self, step: Step, models: Models) -> Step:
        return step

    def denominators(self, step: Step) -> Denominators:
        """Targets, their bytes, and the conversations that have any. MTP's losses are divided by the targets too: what
        is not trained on counts in neither."""
        targets_N = torch.cat([micro.targets_BT.flatten() for micro in step.micro_batches])
        real_N = targets_N != IGNORE
        n_targets = real_N.sum()
        return {
            "targets": n_targets,
            "bytes": (self.token_bytes_V[targets_N.clamp(min=0)] * real_N).sum(),
            "conversations": torch.stack([_conversations(micro) for micro in step.micro_batches]).sum(),
            "mtp": n_targets,
        }

    def loss(self, forward: Forward, head: Head, micro: MicroBatch, denominators: Denominators) -> LossTerm:
        hidden_ND, targets_N = forward.hidden_BTD.flatten(0, 1), micro.targets_BT.flatten()
        if self.by_conversation:
            nll_BT = -token_log_probs(hidden_ND, head.weight_VD, targets_N, copy_VD=head.copy_VD).view_as(
                micro.targets_BT
            )
            of_conversation_BT = targets_of(micro.targets_BT, micro.document_ids_BT).gather(1, micro.document_ids_BT)
            loss = (nll_BT / at_least_one(of_conversation_BT)).sum() / at_least_one(denominators["conversations"])
            nll = nll_BT.detach().sum()
        else:
            nll = linear_cross_entropy(hidden_ND, head.weight_VD, targets_N, copy_VD=head.copy_VD).total
            loss = nll / at_least_one(denominators["targets"])
        trained = (micro.targets_BT != IGNORE).sum()
        return LossTerm(loss, {"loss": loss.detach(), "nll": nll.detach(), "trained": trained})


def _conversations(micro: MicroBatch) -> Tensor:
    """The number of those that have a target."""
    return (targets_of(micro.targets_BT, micro.document_ids_BT) > 0).sum()


def at_least_one(count: Tensor) -> Tensor:
    """For division: a step whose rows train on nothing has loss 0, and no NaN."""
    return count.clamp(min=1)
