"""Weights of one model for another: which tensors fit, and what is said of those that do not."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from dsv3.contracts import is_precision_state

LONGEST = 1500
"""Characters of a list of tensors."""


class Fit(NamedTuple):
    """Tensors of one model compared with another's, each with the reason where they do not fit."""

    fitting: dict[str, Tensor]
    fresh: dict[str, str]  # of the model: in the other with another shape, or not at all
    unused: list[str]  # of the other

    def told(self) -> str:
        """What does not fit; tensors that layers or experts have alike are named once."""
        fresh = _once(f"{name} ({why})" for name, why in self.fresh.items())
        unused = f"; not in this model: {_once(self.unused)}" if self.unused else ""
        return (f"{fresh or 'no tensor is missing'}{unused}")[:LONGEST]


def compared(model: nn.Module, other: Mapping[str, Tensor]) -> Fit:
    """Compare with a state dict. What a precision remembers of the numbers that it met belongs to neither."""
    own = {name: tensor for name, tensor in model.state_dict().items() if not is_precision_state(name)}
    others = {name: tensor for name, tensor in other.items() if not is_precision_state(name)}
    fitting = {name: tensor for name, tensor in others.items() if name in own and tensor.shape == own[name].shape}
    fresh = {
        name: f"{list(tensor.shape)} here, {list(others[name].shape)} there" if name in others else "not there"
        for name, tensor in own.items()
        if name not in fitting
    }
    return Fit(fitting, fresh, [name for name in others if name not in own])


def _once(names: Iterable[str]) -> str:
    alike: dict[str, list[str]] = {}
    for name in names:
        alike.setdefault(re.sub(r"\.\d+(?=\.)", ".*", name), []).append(name)
    return ", ".join(some[0] if len(some) == 1 else pattern for pattern, some in alike.items())
