"""Helpers of the conformance checks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dsv3.contracts import JoinsMatrices
from dsv3.model.layers import joined_weights


def require(condition: bool | Tensor, sentence: str) -> None:
    """Raise AssertionError with `sentence` unless `condition` holds."""
    if not bool(condition):
        raise AssertionError(sentence)


def tensors(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers by name, those left out of checkpoints included."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


def require_meta(make: Callable[[], Any]) -> None:
    """Parts are built on the meta device first, where tensors have shapes and no values."""
    try:
        with torch.device("meta"):
            make()
    except Exception as error:
        raise AssertionError(
            f"it must be possible to build it on torch's meta device, where mistakes are found before any work; its "
            f"constructor may not read values of tensors ({type(error).__name__}: {error})"
        ) from error


def require_uncast(module: nn.Module) -> None:
    """Casts of the whole model (which Lightning and FSDP make) must leave every tensor of the module as it is."""
    before = tensors(module)
    for dtype in (torch.bfloat16, torch.float16):
        module.to(dtype)
        for name, tensor in tensors(module).items():
            require(
                tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]),
                f"`{name}` is {before[name].dtype} and must stay so, with its values, under `.to({dtype})`; "
                f"it became {tensor.dtype}: derive from dsv3.model.layers.FixedDtype",
            )


def require_joined(module: nn.Module) -> None:
    """What its parts declare to be joined must be weights of theirs, of as many rows."""
    for part in module.modules():
        for name in part.joined if isinstance(part, JoinsMatrices) else ():
            require(
                name in dict(part.named_parameters()),
                f"`joined` names {name!r}; {type(part).__name__} has {', '.join(dict(part.named_parameters()))}",
            )
    for weight, rows in joined_weights(module).items():
        require(
            weight.ndim >= 2 and weight.shape[-2] % sum(rows) == 0,
            f"`joined` gives rows {tuple(rows)} to a weight of shape {list(weight.shape)}: the pattern must fill its "
            "last dimension but one, once or several times",
        )


def require_reloadable(module: nn.Module, fresh: nn.Module) -> None:
    """Load the module's state_dict into `fresh`; every tensor that is saved must arrive bit for bit."""
    fresh.load_state_dict(module.state_dict())
    for name, tensor in module.state_dict().items():
        loaded = fresh.state_dict()[name]
        require(
            loaded.dtype == tensor.dtype and torch.equal(loaded, tensor),
            f"`{name}` differs after load_state_dict(state_dict())",
        )
