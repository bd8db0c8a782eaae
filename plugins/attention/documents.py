"""Attention within documents on a GPU, by FlexAttention.

Its kernels go through blocks of queries and keys, and a `BlockMask` tells them which to skip. Documents lie one after
the other in a row, so that the blocks which a block of queries reads follow from where its first and its last token's
documents begin. Neither scores nor a mask of T x T numbers are ever in memory.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.utils.weak import WeakTensorKeyDictionary

BLOCK = 128  # positions

_masks = WeakTensorKeyDictionary()  # of the ids that live: all layers of a pass are given the same tensor


@torch.compiler.disable(recursive=False)  # an attention may be compiled as a whole; this is a part that is already
def document_attention(q: Tensor, k: Tensor, v: Tensor, document_ids_BT: Tensor) -> Tensor:
    """softmax(q k^T) v, causal and within documents; shapes as in `causal_attention`, on a GPU."""
    if document_ids_BT not in _masks:
        _masks[document_ids_BT] = block_mask(document_ids_BT)
    out: Tensor = _compiled()(q, k, v, block_mask=_masks[document_ids_BT], scale=1.0)
    return out


@cache
def _compiled() -> Any:
    return torch.compile(flex_attention, dynamic=False)


def document_starts(document_ids_BT: Tensor) -> Tensor:
    """int64 [B, T]: the position at which each token's document begins."""
    positions_T = torch.arange(document_ids_BT.shape[1], device=document_ids_BT.device)
    begins_BT = torch.ones_like(document_ids_BT, dtype=torch.bool)
    begins_BT[:, 1:] = document_ids_BT[:, 1:] != document_ids_BT[:, :-1]
    return torch.where(begins_BT, positions_T, 0).cummax(1).values


def block_mask(document_ids_BT: Tensor) -> BlockMask:
    """Which blocks of keys a block of queries reads: whole ones, and those of which the kernel masks a part.

    Block i reads from the block in which its first token's document begins, up to itself. Whole are those before itself
    that begin no earlier than its last token's document.
    """
    starts_BT = document_starts(document_ids_BT)
    length, device = starts_BT.shape[1], starts_BT.device
    own_Q = torch.arange(-(-length // BLOCK), device=device)
    first_BQ = starts_BT[:, ::BLOCK] // BLOCK
    last_T = (own_Q * BLOCK + BLOCK - 1).clamp(max=length - 1)
    whole_BQ = torch.minimum((starts_BT[:, last_T] + BLOCK - 1) // BLOCK, own_Q)
    cut_BQ = whole_BQ - first_BQ
    cut_BQK = torch.where(own_Q < cut_BQ.unsqueeze(2), first_BQ.unsqueeze(2) + own_Q, own_Q.unsqueeze(1))
    whole_BQK = (whole_BQ.unsqueeze(2) + own_Q).clamp(max=len(own_Q) - 1)

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= starts_BT[b, query])

    def blocks(numbers: Tensor) -> Tensor:
        return numbers.unsqueeze(1).to(torch.int32)

    return BlockMask.from_kv_blocks(
        blocks(cut_BQ + 1), blocks(cut_BQK), blocks(own_Q - whole_BQ), blocks(whole_BQK),
        BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(length, length),
    )  # fmt: skip
