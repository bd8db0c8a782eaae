"""Attention at MLA's unequal widths by every kernel that torch has for a GPU, and a layer of ours."""

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dsv3.bench.compared import ours
from dsv3.bench.measuring import Figure
from dsv3.bench.on_device import reason, size_on, timed

KERNELS = {
    "flash, v padded": (SDPBackend.FLASH_ATTENTION, True),
    "cuDNN": (SDPBackend.CUDNN_ATTENTION, False),
    "cuDNN, v padded": (SDPBackend.CUDNN_ATTENTION, True),
    "memory-efficient": (SDPBackend.EFFICIENT_ATTENTION, False),
}
DOCUMENTS = 4
"""Of a row, where they are kept apart."""


def attention(repeats: int, device: torch.device) -> Iterator[Figure]:
    """Milliseconds forward and backward: of causal attention by each kernel, and of a whole layer with its projections,
    whose documents are kept apart or not."""
    size = size_on(device)
    config, model = ours(size, "precision=bf16", "model.n_layers=1", device=device)
    wide, narrow = config.model.qk_nope_head_dim + config.model.qk_rope_head_dim, config.model.v_head_dim
    shape = (size.rows, config.model.n_heads, size.length)
    q, k, v, dy = (
        torch.randn(*shape, width, device=device, dtype=torch.bfloat16, requires_grad=True)
        for width in (wide, wide, narrow, narrow)
    )
    x_BTD = torch.randn(size.rows, size.length, config.model.dim, device=device, requires_grad=True)
    positions_BT = torch.arange(size.length, device=device).expand(size.rows, -1)
    documents_BT = positions_BT // (size.length // DOCUMENTS) + 1

    def by(kernel: SDPBackend, padded: bool) -> Callable[[], object]:
        def program() -> object:
            filled = F.pad(v, (0, wide - narrow)) if padded else v
            with sdpa_kernel(kernel):
                out = F.scaled_dot_product_attention(q, k, filled, is_causal=True, scale=1.0)
            return torch.autograd.grad(out[..., :narrow], (q, k, v), dy)

        return program

    def layer(documents_BT: Tensor | None) -> Callable[[], object]:
        return lambda: model.attention(0)(x_BTD, positions_BT, documents_BT).sum().backward()

    programs = {f"causal: {name}": by(*kernel) for name, kernel in KERNELS.items()}
    programs |= {"a layer, causal": layer(None), f"a layer, {DOCUMENTS} documents": layer(documents_BT)}
    for what, program in programs.items():
        try:
            value, note = 1000 * timed(program, repeats), f"{shape} of {wide} and {narrow}, bf16"
        except RuntimeError as error:  # a kernel that has no such shapes, or none on this device
            value, note = float("nan"), reason(error)
        yield Figure("attention", what, value, " ms", note=note)
