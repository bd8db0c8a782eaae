"""Parameter counts: total, active per token, MTP.

Published sizes count the routing biases of the main model and of the MTP modules in, as the published checkpoint
stores them, but not among the active parameters. A router without a bias that is saved has none to count.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from dsv3.model.decoder import Decoder
from dsv3.model.moe import MoE


class ParameterCount(NamedTuple):
    total: int  # of the main model, routing biases included
    active: int  # per token: K of the E routed experts and what it reads of the memory; embedding and head, no biases
    mtp: int  # of the MTP modules, routing biases included, the shared embedding and head not


def count_parameters(model: Decoder) -> ParameterCount:
    """Count a built model (on any device, the meta device too)."""
    modules: Any = model.mtp
    mtp = sum(p.numel() for p in modules.parameters())
    weights = sum(p.numel() for p in model.parameters()) - mtp
    memory: Any = model.memory
    idle = sum(p.numel() for p in memory.parameters()) - memory.active_parameters
    for moe in _moe_modules(model.layers):
        n_experts = moe.balancing.bias.numel()
        routed = sum(p.numel() for p in moe.experts.parameters())
        idle += routed * (n_experts - moe.router.top_k) // n_experts
    return ParameterCount(weights + _biases(model.layers), weights - idle, mtp + _biases(modules))


def is_table(model: nn.Module, parameter: nn.Parameter) -> bool:
    """Whether it is a table with sparse gradients."""
    return any(
        getattr(module, "sparse", False) and parameter is getattr(module, "weight", None) for module in model.modules()
    )


def _moe_modules(module: nn.Module) -> Iterator[Any]:
    return (m for m in module.modules() if isinstance(m, MoE))


def _biases(module: nn.Module) -> int:
    """Routing biases below `module`: the floating-point state of balancing methods (counts of load are integers)."""
    states = (moe.balancing.state_dict().values() for moe in _moe_modules(module))
    return sum(tensor.numel() for state in states for tensor in state if tensor.is_floating_point())
