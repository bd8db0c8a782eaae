"""torch.compile of what has one shape in every training step: attention, norms, routers, dense and shared FFNs.

Dispatch and routed experts see another number of rows in every step, and stay as they are. So does everything where no
gradient is asked for: texts of every length are evaluated and generated. The first step takes about half a minute.
"""

from typing import Any

import torch

from dsv3.model.decoder import Block, Decoder
from dsv3.model.layers import RMSNorm, SwiGLU
from dsv3.model.moe import MoE

VARIANTS = 64  # compiled versions of one function: each layer's weights and widths make their own


def compile_parts(model: Decoder) -> None:
    """Compile, at their first use in training, the parts of every block, MTP's included, and all norms."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, VARIANTS)
    for module in model.modules():
        if isinstance(module, Block):
            compile_for_training(module.self_attn)
        elif isinstance(module, MoE):
            compile_for_training(module.router)
        elif isinstance(module, RMSNorm | SwiGLU):
            compile_for_training(module)


def compile_for_training(module: Any) -> None:
    """Where gradients are asked for, `module` runs compiled."""
    eager, compiled = module.forward, torch.compile(module.forward, dynamic=False)

    def forward(*args: Any, **kwargs: Any) -> Any:
        return (compiled if torch.is_grad_enabled() else eager)(*args, **kwargs)

    module.forward = forward
