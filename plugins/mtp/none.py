"""No multi-token prediction."""

from collections.abc import Callable, Iterable

from torch import Tensor, nn

from dsv3.contracts import Cache, MicroBatch, MTPPrediction, Precision


class NoMTP(nn.Module):
    """Predicts the next token only."""

    depth = 0
    after_final_norm = True

    def __init__(self, *, block: Callable[[], nn.Module], precision: Precision) -> None:
        super().__init__()

    def weight(self, tokens_seen: int) -> float:
        return 0.0

    def forward(
        self, h_BTD: Tensor, batch: MicroBatch, embed: Callable[[Tensor], Tensor], isolate: bool
    ) -> list[MTPPrediction]:
        return []

    def new_caches(self, rows: Iterable[int] = ()) -> list[Cache]:
        return []

    def extend(
        self, depth: int, h_BTD: Tensor, tokens_BT: Tensor, embed: Callable[[Tensor], Tensor], cache: Cache
    ) -> tuple[Tensor, Tensor]:
        raise ValueError(f"there is no MTP module of depth {depth}")
