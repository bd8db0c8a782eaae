"""A backend that counts how many tokens each expert is given."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv3.inference.backend import DecoderBackend
from dsv3.model.decoder import Decoder


class RoutedBackend(DecoderBackend):
    """`DecoderBackend`, and the load of all experts of the main model since it was made."""

    def __init__(self, model: Decoder) -> None:
        super().__init__(model)
        moes = [(name, moe) for name, moe in model.moe_layers() if name.startswith("layers.")]
        self.experts = max((len(moe.balancing.bias) for _, moe in moes), default=0)  # of a layer
        self.load = {name: torch.zeros(self.experts, dtype=torch.int64) for name, _ in moes}  # tokens of each

    def read(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], wanted: Sequence[int]) -> list[Tensor]:
        logits = super().read(rows, tokens, wanted)
        chosen = self.chosen_experts()
        for name, load_E in self.load.items():
            used_M = torch.cat([of_row[name] for of_row in chosen]).flatten()
            load_E += torch.bincount(used_M, minlength=self.experts)
        return logits
