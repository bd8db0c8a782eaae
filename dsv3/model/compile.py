"""torch.compile of modules whose shapes are the same in every training step: attention, norms, routers, dense and
shared FFNs.

Dispatch and routed experts see another number of tokens in every step and stay eager. So do layers that opt out
(`compilable`), and everything that needs no gradient: evaluation and generation see sequences of every length. The
first step takes about half a minute.
"""

from collections.abc import Iterator
from typing import Any

import torch

from dsv3.model.decoder import Block, Decoder
from dsv3.model.layers import RMSNorm, SwiGLU
from dsv3.model.moe import MoE

VARIANTS = 64  # compiled versions of one function: each layer's weights and widths make their own


def compile_parts(model: Decoder) -> None:
    """Compile, at their first use in training, the parts of every block, MTP's included, and all norms.

    A part that holds a layer with `compilable = False` stays eager.
    """
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    for part in _parts(model):
        if all(getattr(layer, "compilable", True) for layer in part.modules()):
            compile_for_training(part)


def _parts(model: Decoder) -> Iterator[Any]:
    for module in model.modules():
        if isinstance(module, Block):
            yield module.self_attn
        elif isinstance(module, MoE):
            yield module.router
        elif isinstance(module, RMSNorm | SwiGLU):
            yield module


def compile_for_training(module: Any) -> None:
    """Where gradients are asked for, `module` runs compiled."""
    eager, compiled = module.forward, torch.compile(module.forward, dynamic=False)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else eager)(*args, **kwargs)

    module.forward = forward
