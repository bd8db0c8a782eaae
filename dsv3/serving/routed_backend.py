"""A backend that counts how many tokens each expert is given."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dsv3.inference.backend import DecoderBackend
from dsv3.inference.onnx_backend import OnnxBackend


class RoutedBackend:
    """A backend, and the load of all experts of its main model since it was made."""

    def __init__(self, backend: DecoderBackend | OnnxBackend, layers: Sequence[str], experts: int) -> None:
        """`layers`: names of those with experts, so many of them in each."""
        self.backend, self.experts = backend, experts
        self.shares_prefixes, self.most_ragged = backend.shares_prefixes, backend.most_ragged
        self.draft_costs = backend.draft_costs
        self.add, self.copy, self.drop, self.draft = backend.add, backend.copy, backend.drop, backend.draft
        self.rewind, self.rest, self.chosen_experts = backend.rewind, backend.rest, backend.chosen_experts
        self.load = {name: torch.zeros(experts, dtype=torch.int64) for name in layers}  # tokens of each

    def read(self, rows: Sequence[int], tokens: Sequence[Sequence[int]], wanted: Sequence[int]) -> list[Tensor]:
        logits = self.backend.read(rows, tokens, wanted)
        if self.load:
            used = self.backend.used_experts()
            for name, load_E in self.load.items():
                load_E += torch.bincount(used[name], minlength=self.experts)
        return logits
