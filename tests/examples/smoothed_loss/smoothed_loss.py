"""An objective of one's own: cross-entropy with label smoothing. Lives outside the project.

    L = sum over targets y of (1 - a) * -ln p(y) + a * mean over tokens v of -ln p(v), divided by the number of targets

`nll` stays the plain cross-entropy, which can be compared between runs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.contracts import IGNORE, Denominators, Forward, Head, LossTerm, MicroBatch, Models, Statistic, Step


class SmoothedLoss(nn.Module):
    """smoothing: a, at least 0 and below 1. token_bytes_V: given by the core, and not needed here."""

    statistics = (
        Statistic("loss", "nats per token", "smoothed", over="targets", shown=True),
        Statistic("nll", "nats per token", "plain", over="targets", shown=True),
    )

    def __init__(self, *, smoothing: float, token_bytes_V: Tensor) -> None:
        super().__init__()
        if not 0 <= smoothing < 1:
            raise ValueError(f"objective.smoothing={smoothing}: must be at least 0 and below 1")
        self.smoothing = smoothing

    def prepare(self, step: Step, models: Models) -> Step:
        return step

    def denominators(self, step: Step) -> Denominators:
        targets_N = torch.cat([micro.targets_BT.flatten() for micro in step.micro_batches])
        documents_N = torch.cat([micro.document_ids_BT.flatten() for micro in step.micro_batches])
        return {"targets": (targets_N != IGNORE).sum(), "mtp": (documents_N > 0).sum()}

    def loss(self, forward: Forward, head: Head, micro: MicroBatch, denominators: Denominators) -> LossTerm:
        weight_VD = head.weight_VD.to(head.copy_VD.dtype)
        logits_NV = (forward.hidden_BTD.flatten(0, 1).to(weight_VD.dtype) @ weight_VD.T).float()
        targets_N = micro.targets_BT.flatten()
        smoothed = F.cross_entropy(logits_NV, targets_N, reduction="sum", label_smoothing=self.smoothing)
        with torch.no_grad():
            plain = F.cross_entropy(logits_NV, targets_N, reduction="sum")
        return LossTerm(smoothed / denominators["targets"], {"smoothed": smoothed.detach(), "plain": plain})
