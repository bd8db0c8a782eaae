"""Causal attention over whole rows, in blocks of queries: each block is a pair of dense products.

    S = q k^T    P = softmax(S) over the keys up to the query, and of its document    o = P v
    dv = P^T do    dS = P * (do v^T - rowsum(P * do v^T))    dq = dS k    dk = dS^T q

Queries from i to i + BLOCK see keys up to i + BLOCK, so that of the square only a little more than the half below the
diagonal is computed. On a CPU this is three times as fast as the flash kernel of
`torch.nn.functional.scaled_dot_product_attention`, in both directions, and needs no equal widths of q, k and v; P is
kept for the backward pass, so it is for rows of up to `LONGEST` positions. Elsewhere that function is used, and on
a GPU FlexAttention within documents.

S is rounded to the dtype of q before the softmax; sums inside the products and the softmax are FP32 (FP64 stays).
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from plugins.attention.masks import attention_mask

BLOCK = 128  # queries
LONGEST = 2048  # positions


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, document_ids_BT: Tensor | None, lengths: Sequence[int] | None = None
) -> Tensor:
    """softmax(q k^T) v; a query sees the keys up to its own position, and of its document if ids are given.

    q [B, H, T, R], multiplied by the softmax scale; k [B, H, S, R], v [B, H, S, V] -> [B, H, T, V]. The queries are the
    last T of S positions, or in row b of the first lengths[b] ones.
    """
    queries, keys = q.shape[2], k.shape[2]
    if q.device.type == "cpu" and queries == keys <= LONGEST:
        flat = (t.flatten(0, 1) for t in (q, k, v))
        return _Blocks.apply(*flat, document_ids_BT).unflatten(0, q.shape[:2])
    # Wider rows of FP32 do not fit into the memory that a block of FlexAttention's kernel has.
    flexible = q.element_size() == 2 or (q.dtype == torch.float32 and q.shape[-1] <= 128)
    if document_ids_BT is not None and q.device.type == "cuda" and flexible:
        from plugins.attention.documents import document_attention  # imports the compiler

        return document_attention(q, k, v, document_ids_BT)
    mask = attention_mask(queries, keys, document_ids_BT, q.device, lengths)
    # Equal widths of q, k and v take the flash kernel; zeros change no product.
    width = max(q.shape[-1], v.shape[-1])
    q, k, v_padded = (t if t.shape[-1] == width else F.pad(t, (0, width - t.shape[-1])) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v_padded, attn_mask=mask, is_causal=mask is None, scale=1.0)
    return out[..., : v.shape[-1]]


class _Blocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_GTR: Tensor, k_GTR: Tensor, v_GTV: Tensor, document_ids_BT: Tensor | None) -> Tensor:
        """G rows and heads together; those of a row are neighbours."""
        out_GTV = torch.empty_like(v_GTV, memory_format=torch.contiguous_format)
        kept = []
        for rows, end in _blocks(q_GTR.shape[1]):
            scores = q_GTR[:, rows] @ k_GTR[:, :end].mT
            _mask(scores, rows, document_ids_BT)
            p = scores.softmax(-1)
            torch.bmm(p, v_GTV[:, :end], out=out_GTV[:, rows])
            kept.append(p)
        ctx.save_for_backward(q_GTR, k_GTR, v_GTV, *kept)
        return out_GTV

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_GTR, k_GTR, v_GTV, *kept = ctx.saved_tensors
        accumulate = torch.promote_types(q_GTR.dtype, torch.float32)
        dq = torch.empty_like(q_GTR)
        dk, dv = (torch.zeros_like(t, dtype=accumulate) for t in (k_GTR, v_GTV))
        for p, (rows, end) in zip(kept, _blocks(q_GTR.shape[1]), strict=True):
            do = grads[0][:, rows]
            dv[:, :end] += p.mT @ do
            ds = torch._softmax_backward_data(do @ v_GTV[:, :end].mT, p, -1, p.dtype)
            torch.bmm(ds, k_GTR[:, :end], out=dq[:, rows])
            dk[:, :end] += ds.mT @ q_GTR[:, rows]
        return dq, dk.to(k_GTR.dtype), dv.to(v_GTV.dtype), None


def _blocks(length: int) -> Iterator[tuple[slice, int]]:
    for start in range(0, length, BLOCK):
        end = min(start + BLOCK, length)
        yield slice(start, end), end


def _mask(scores_GQS: Tensor, rows: slice, document_ids_BT: Tensor | None) -> None:
    """Set to -inf, in place, the scores of keys after the query (in the block's own square) and of other documents."""
    own = scores_GQS[:, :, rows]
    size = own.shape[-1]
    own.masked_fill_(torch.ones(size, size, dtype=torch.bool, device=own.device).triu_(1), float("-inf"))
    if document_ids_BT is not None:
        ids_BQ, ids_BS = document_ids_BT[:, rows], document_ids_BT[:, : rows.stop]
        other_BQS = ids_BQ.unsqueeze(2) != ids_BS.unsqueeze(1)
        scores_GQS.unflatten(0, (len(document_ids_BT), -1)).masked_fill_(other_BQS.unsqueeze(1), float("-inf"))
