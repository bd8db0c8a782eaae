"""The experts that the tokens of a row were routed to while it was read and written."""

from collections.abc import Mapping

from torch import Tensor

UNKNOWN = -1
"""In place of each expert of a position that is not recorded."""


class RecordedExperts:
    """By MoE layer and position. Beginnings that were copied from a row without a record are `UNKNOWN`."""

    def __init__(self) -> None:
        self.by_layer: dict[str, list[list[int]]] = {}

    def put(self, start: int, chosen: Mapping[str, Tensor]) -> None:
        """From position `start` on, int64 [T, K] by layer; instead of drafts that were not kept, if there are any."""
        for name, experts_TK in chosen.items():
            positions = self.by_layer.setdefault(name, [])
            positions += [[UNKNOWN] * experts_TK.shape[1]] * (start - len(positions))
            positions[start:] = experts_TK.tolist()

    def copy(self, source: "RecordedExperts", length: int) -> None:
        """The first `length` positions of another row."""
        self.by_layer = {name: positions[:length] for name, positions in source.by_layer.items()}
