"""DeepSeek-V3's multi-token prediction (report eq. 21-25).

    h'_i = M_k [norm(h_i^(k-1)) ; norm(Emb(t_(i+k)))]      h^k = TRM_k(h')      P_(i+k+1) = head(norm(h_i^k))

Depth k keeps the causal chain: it is given the true token t_(i+k) and predicts t_(i+k+1). The embedding and the
head are the main model's own objects. Positions without a token k further on are cut off, never padded, so that
they count neither as loss nor as expert load. The loss, with D depths:

    L_MTP = lambda / D * sum_k (sum over targets of -ln P_(i+k+1)) / the objective's denominator for MTP
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dsv3.bounds import PositiveFloat, PositiveInt
from dsv3.contracts import (
    IGNORE,
    Cache,
    Denominators,
    Forward,
    Head,
    LossTerm,
    MicroBatch,
    MTPPrediction,
    Precision,
    Routing,
    Schedule,
    Statistic,
)
from dsv3.model.layers import RMSNorm, next_positions
from dsv3.model.losses import linear_cross_entropy


class MTPModule(nn.Module):
    """One depth: M_k, a Transformer block and the final norm."""

    def __init__(
        self, *, dim: int, norm_eps: float, hidden_first: bool, block: nn.Module, precision: Precision
    ) -> None:
        super().__init__()
        self.enorm = RMSNorm(dim, eps=norm_eps)
        self.hnorm = RMSNorm(dim, eps=norm_eps)
        self.eh_proj = precision.linear(2 * dim, dim, role="mtp_projection")
        self.block = block
        self.norm = RMSNorm(dim, eps=norm_eps)
        self.hidden_first = hidden_first

    def forward(
        self,
        h_BTD: Tensor,
        embedded_BTD: Tensor,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        document_ids_BT: Tensor | None,
        cache: Cache | None = None,
    ) -> tuple[Tensor, Routing | None]:
        """Return h^k (before this module's final norm) and the routing of its MoE."""
        parts = (self.hnorm(h_BTD), self.enorm(embedded_BTD))
        joined = torch.cat(parts if self.hidden_first else parts[::-1], dim=-1)
        block: Any = self.block
        return block(self.eh_proj(joined), tokens_BT, positions_BT, document_ids_BT, cache)


class DeepSeekMTP(nn.Module):
    """D sequential MTP modules."""

    def __init__(
        self,
        *,
        dim: PositiveInt,
        norm_eps: PositiveFloat,
        depth: PositiveInt,
        concat: Literal["embedding_hidden", "hidden_embedding"],
        after_final_norm: bool,
        document_boundary: Literal["mask", "cross"],
        weight: Schedule,
        block: Callable[[], nn.Module],
        precision: Precision,
    ) -> None:
        super().__init__()
        if concat not in ("embedding_hidden", "hidden_embedding"):
            raise ValueError(f"mtp.concat={concat}: must be embedding_hidden or hidden_embedding")
        if document_boundary not in ("mask", "cross"):
            raise ValueError(f"mtp.document_boundary={document_boundary}: must be mask or cross")
        self.depths = nn.ModuleList(
            MTPModule(
                dim=dim,
                norm_eps=norm_eps,
                hidden_first=concat == "hidden_embedding",
                block=block(),
                precision=precision,
            )
            for _ in range(depth)
        )
        self.depth = depth
        self.weight = weight
        self.after_final_norm = after_final_norm
        self.mask_boundary = document_boundary == "mask"
        self.statistics = [figure for k in range(1, depth + 1) for figure in statistics_of(k)]

    def forward(
        self, h_BTD: Tensor, batch: MicroBatch, embed: Callable[[Tensor], Tensor], isolate: bool
    ) -> list[MTPPrediction]:
        predictions = []
        for k, module in enumerate(self.depths, start=1):
            length = batch.tokens_BT.shape[1] - k
            norm: Any = module.norm
            tokens_BS = batch.tokens_BT[:, k:]
            documents = batch.document_ids_BT[:, :length] if isolate else None
            h_BTD, routing = module(
                h_BTD[:, :length].contiguous(), embed(tokens_BS), tokens_BS, batch.positions_BT[:, :length], documents
            )
            predictions.append(MTPPrediction(norm(h_BTD), self._targets(batch, k), routing))
        return predictions

    def auxiliary_loss(
        self, forward: Forward, head: Head, micro: MicroBatch, denominators: Denominators, tokens_seen: int
    ) -> LossTerm:
        """lambda / D * sum over depths of the depth's summed loss / denominators["mtp"] (or "mtp_divisor")."""
        scale = self.weight(tokens_seen) / self.depth
        divisor = denominators.get("mtp_divisor", denominators["mtp"]).clamp(min=1)  # nothing to train on: 0
        losses: list[Tensor] = []
        sums: dict[str, Tensor] = {}
        for k, prediction in enumerate(forward.predictions, start=1):
            hidden_ND, targets_N = prediction.hidden_BSD.flatten(0, 1), prediction.targets_BS.flatten()
            loss = linear_cross_entropy(hidden_ND, head.weight_VD, targets_N, copy_VD=head.copy_VD)
            losses.append(scale * loss.total / divisor)
            sums |= {
                f"mtp{k}_nll": loss.total.detach(),
                f"mtp{k}_correct": loss.correct,
                f"mtp{k}_targets": loss.targets,
            }
        return LossTerm(sum(losses[1:], start=losses[0]), sums)

    def new_caches(self, rows: Iterable[int] = ()) -> list[Cache]:
        return [module.get_submodule("block.self_attn").new_cache(rows) for module in self.depths]  # type: ignore[operator]

    def extend(
        self, depth: int, h_BTD: Tensor, tokens_BT: Tensor, embed: Callable[[Tensor], Tensor], cache: Cache
    ) -> tuple[Tensor, Tensor]:
        module: Any = self.depths[depth - 1]
        positions_BT = next_positions(cache.lengths.values(), tokens_BT.shape[1], tokens_BT.device)
        h_BTD, _ = module(h_BTD, embed(tokens_BT), tokens_BT, positions_BT, None, cache)
        return h_BTD, module.norm(h_BTD)

    def _targets(self, batch: MicroBatch, k: int) -> Tensor:
        """t_(i+k+1) for i < T - k; with a masked boundary, only where it belongs to the document of t_i.

        The target of a row's last position is not an input of the row: it counts to the last input's document.
        """
        targets_BS = batch.targets_BT[:, k:]
        if not self.mask_boundary:
            return targets_BS
        ids_BT = batch.document_ids_BT
        of_target_BT = torch.cat((ids_BT[:, 1:], ids_BT[:, -1:]), dim=1)
        return targets_BS.masked_fill(of_target_BT[:, k:] != ids_BT[:, : targets_BS.shape[1]], IGNORE)


def statistics_of(k: int) -> list[Statistic]:
    """Loss and accuracy of depth k."""
    return [
        Statistic(f"mtp{k}_loss", "nats per token", f"mtp{k}_nll", over="mtp"),
        Statistic(f"mtp{k}_accuracy", "share of targets", f"mtp{k}_correct", over=f"mtp{k}_targets"),
    ]
