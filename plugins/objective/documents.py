"""Sums over the documents of packed rows."""

from torch import Tensor

from dsv3.contracts import IGNORE


def of_documents(values_BT: Tensor, ids_BT: Tensor) -> Tensor:
    """Sums over the positions of each document, [B, T + 2] or more by document id; an even number of ids from 1 on."""
    sums = values_BT.new_zeros(ids_BT.shape[0], 2 * (ids_BT.shape[1] // 2) + 3)
    return sums.scatter_add(1, ids_BT, values_BT)


def targets_of(targets_BT: Tensor, ids_BT: Tensor) -> Tensor:
    """The number of targets of each document, int64, as `of_documents`; that of padding, 0, has none."""
    return of_documents((targets_BT != IGNORE).long(), ids_BT)
