"""Activation memory of a block, against what autograd keeps of a real one."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from dsv3.build import build_model
from dsv3.planning.activations import block_activations, logits, mtp_activations
from dsv3.planning.recipe import FORMATS
from dsv3.planning.skeleton import Skeleton
from tests.planning.models import PRESETS, config, skeleton

SMALL = ("model=small", "precision=fp32", "experts=loop", "dispatch.pad_multiple=1")
ROWS, LENGTH = 2, 32


def numbers_saved(*overrides: str, layer: int) -> float:
    """Floating-point numbers per token that autograd keeps of a block, weights left out, each memory once."""
    model = build_model(config(*SMALL, *overrides))
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.untyped_storage().data_ptr()
        if tensor.is_floating_point() and memory not in weights:
            kept[memory] = tensor
        return tensor

    x_BTD = torch.randn(ROWS, LENGTH, config(*SMALL).model.dim, requires_grad=True)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model.layers[layer](x_BTD, torch.zeros(ROWS, LENGTH).long(), torch.arange(LENGTH).expand(ROWS, -1))
    return sum(t.untyped_storage().nbytes() for t in kept.values()) / 4 / (ROWS * LENGTH)


def unfused(s: Skeleton, *, moe: bool, is_mla: bool) -> int:
    """What separate operations keep besides: planning takes kernels for fused, and statistics for nothing."""
    latents = [m.inputs for m in s.attention.matrices if m.role == "attention_up" and m.inputs != s.dim]
    norms = 2 + len(latents)  # 1 / rms
    router = 1 + 3 * s.top_k if moe else 0  # the sum of the chosen; the gates, by token and by expert
    m = config(*SMALL).model
    attention = m.n_heads * LENGTH  # probabilities: a row is one block of queries
    if not is_mla:
        return norms + router + attention + m.head_dim  # RoPE's tables
    # k_R for every head; RoPE's tables; the memory of the shared k_R lies with that of c_KV.
    return norms + router + attention + m.n_heads * m.qk_rope_head_dim + 2 * m.qk_rope_head_dim


@pytest.mark.parametrize("moe", [False, True])
@pytest.mark.parametrize("attention", ["mla", "gqa"])
def test_a_block_keeps_what_is_planned(attention: str, moe: bool) -> None:
    s = skeleton(*SMALL, f"attention={attention}")
    planned = block_activations(s, FORMATS["fp32"], "none", moe=moe) / 4
    saved = numbers_saved(f"attention={attention}", layer=-1 if moe else 0)
    assert planned <= saved <= planned + unfused(s, moe=moe, is_mla=attention == "mla")


def test_selective_671b_by_hand() -> None:
    """BF16 norm inputs and latents; E5M6 before W_O; FP8 rows of experts and SwiGLU inputs; FP32 affinities."""
    s, f = skeleton("model=v3_671b"), FORMATS["fp8"]
    attention = 2 * 2 * 7168 + 2 * (1536 + 512 + 64) + 1.5 * 128 * 128
    experts = 4 * 256 + 8 * (7168 + 2 * 2048) + 2 * 2048
    assert block_activations(s, f, "selective", moe=True) == attention + experts
    assert block_activations(s, f, "selective", moe=False) == attention + 2 * 18432
    assert mtp_activations(s, f, "selective") == 2 * 2 * 7168
    assert logits(s) == 2 * 4 * 129_280


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("formats", FORMATS)
def test_each_recomputation_keeps_less(preset: str, formats: str) -> None:
    s, f = skeleton(f"model={preset}"), FORMATS[formats]
    for moe in (False, True):
        none, selective, full = (block_activations(s, f, r, moe=moe) for r in ("none", "selective", "full"))
        assert none > selective > full == s.dim * f.activation
