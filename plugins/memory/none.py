"""No memory next to the embedding."""

from collections.abc import Iterable

from torch import Tensor, nn

from dsv3.contracts import Cache


class NoMemory(nn.Module):
    """Adds nothing."""

    active_parameters = 0

    def forward(
        self, x_BTD: Tensor, tokens_BT: Tensor, document_ids_BT: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        return x_BTD

    def new_cache(self, rows: Iterable[int] = ()) -> Cache | None:
        return None
