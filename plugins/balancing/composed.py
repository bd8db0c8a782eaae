"""Several balancing methods at once, such as DeepSeek-V3's: loss-free with a small sequence-wise loss."""

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor, nn

from dsv3.contracts import Balancing, Routing


class Composed(nn.Module):
    """The sum of its parts' biases and of their losses; every part observes the load and is updated.

    parts: name -> a factory of a balancing module, called here, so that each layer has modules of its own.
        The names are those in the checkpoint (`parts.<name>.bias`).
    """

    def __init__(self, *, parts: Mapping[str, Callable[[], nn.Module]]) -> None:
        super().__init__()
        if not parts:
            raise ValueError("balancing.parts={}: must have at least one part; balancing=none has none")
        self.parts = nn.ModuleDict({name: factory() for name, factory in parts.items()})

    @property
    def bias(self) -> Tensor:
        return torch.stack([part.bias for part in self._parts()]).sum(0)

    def loss(self, routing: Routing, batch_shape: tuple[int, int], mask_BT: Tensor, tokens_seen: int) -> Tensor:
        losses = [part.loss(routing, batch_shape, mask_BT, tokens_seen) for part in self._parts()]
        return torch.stack(losses).sum()

    def observe(self, counts_E: Tensor) -> None:
        for part in self._parts():
            part.observe(counts_E)

    def update(self, tokens_seen: int) -> None:
        for part in self._parts():
            part.update(tokens_seen)

    def _parts(self) -> list[Balancing]:
        return [cast(Balancing, part) for part in self.parts.values()]
