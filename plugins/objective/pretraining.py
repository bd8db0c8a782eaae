"""Next-token prediction (report eq. 25 without its MTP part, which the MTP plugin adds).

    L = sum over targets of -ln p(target) / number of targets of the global batch, in nats per target

Padding and masked positions are no targets. Bits per byte are those of the trained text: nats / ln 2 / bytes that the
targets stand for.
"""

import math

import torch
from torch import Tensor, nn

from dsv3.contracts import IGNORE, Denominators, Forward, Head, LossTerm, MicroBatch, Models, Statistic, Step
from dsv3.model.losses import linear_cross_entropy


class Pretraining(nn.Module):
    """Cross-entropy of the next token.

    token_bytes_V: bytes that each token stands for, int64 [V].
    """

    statistics = (
        Statistic("loss", "nats per token", "nll", over="targets", shown=True),
        Statistic("bpb", "bits per byte", "nll", over="bytes", factor=1 / math.log(2), shown=True),
    )
    token_bytes_V: Tensor

    def __init__(self, *, token_bytes_V: Tensor) -> None:
        super().__init__()
        self.register_buffer("token_bytes_V", token_bytes_V, persistent=False)

    def prepare(self, step: Step, models: Models) -> Step:
        return step

    def denominators(self, step: Step) -> Denominators:
        """Targets and their bytes; MTP's losses are divided by all positions but padding (eq. 24)."""
        targets_N = torch.cat([micro.targets_BT.flatten() for micro in step.micro_batches])
        documents_N = torch.cat([micro.document_ids_BT.flatten() for micro in step.micro_batches])
        real_N = targets_N != IGNORE
        return {
            "targets": real_N.sum(),
            "bytes": (self.token_bytes_V[targets_N.clamp(min=0)] * real_N).sum(),
            "mtp": (documents_N > 0).sum(),
        }

    def loss(self, forward: Forward, head: Head, micro: MicroBatch, denominators: Denominators) -> LossTerm:
        main = linear_cross_entropy(
            forward.hidden_BTD.flatten(0, 1), head.weight_VD, micro.targets_BT.flatten(), copy_VD=head.copy_VD
        )
        return LossTerm(main.total / denominators["targets"], {"nll": main.total.detach()})
