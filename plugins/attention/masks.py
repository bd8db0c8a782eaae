"""Attention masks: causal, and within documents."""

from collections.abc import Sequence

import torch
from torch import Tensor


def attention_mask(
    queries: int,
    keys: int,
    document_ids_BT: Tensor | None,
    device: torch.device,
    lengths: Sequence[int] | None = None,
) -> Tensor | None:
    """True where the query may look: causal, and within its document if ids are given.

    The queries are the last of the keys' positions; where `lengths` are given, in row b the last of the first
    lengths[b] ones. Returns [queries, keys], [B, 1, queries, keys] with documents or with lengths that differ, or None
    where the square causal mask is meant, which kernels apply by themselves.

    Raises:
        ValueError: documents are given while the keys reach back before the queries (a cache is in use).
    """
    if lengths is not None and len(set(lengths)) > 1:
        return _visible(queries, keys, lengths, device).unsqueeze(1)
    if document_ids_BT is None and queries == keys:
        return None
    causal = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    if document_ids_BT is None:
        return causal
    if queries != keys:
        raise ValueError("document ids mask whole rows; they do not go together with a cache")
    return causal & (document_ids_BT[:, None, :, None] == document_ids_BT[:, None, None, :])


def hide_later(scores_BTHS: Tensor, lengths: Sequence[int]) -> None:
    """Set to -inf, in place, the scores of keys after each query; row b's queries are the last of lengths[b] keys."""
    queries, keys, held = scores_BTHS.shape[1], scores_BTHS.shape[3], lengths[0]
    if len(set(lengths)) > 1:
        visible_BTS = _visible(queries, keys, lengths, scores_BTHS.device)
        scores_BTHS.masked_fill_(visible_BTS.unsqueeze(2).logical_not_(), float("-inf"))
        return
    scores_BTHS[..., held:] = float("-inf")
    if queries > 1:
        later_TT = torch.ones(queries, queries, dtype=torch.bool, device=scores_BTHS.device).triu(1)
        scores_BTHS[..., held - queries : held].masked_fill_(later_TT.unsqueeze(1), float("-inf"))


def _visible(queries: int, keys: int, lengths: Sequence[int], device: torch.device) -> Tensor:
    """bool [B, queries, keys]: keys up to the query's own position."""
    first_B = torch.tensor(lengths, device=device) - queries
    own_BT = first_B.unsqueeze(1) + torch.arange(queries, device=device)
    return torch.arange(keys, device=device) <= own_BT.unsqueeze(2)
