"""Which positions a query may see."""

import torch
from torch import Tensor


def attention_mask(queries: int, keys: int, document_ids_BT: Tensor | None, device: torch.device) -> Tensor | None:
    """True where the query may look: causal, and within its document if ids are given.

    The queries are the last of the keys' positions. Returns [queries, keys], [B, 1, T, T] with documents, or
    None where the square causal mask is meant, which kernels apply by themselves.

    Raises:
        ValueError: documents are given while the keys reach back before the queries (a cache is in use).
    """
    if document_ids_BT is None and queries == keys:
        return None
    causal = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    if document_ids_BT is None:
        return causal
    if queries != keys:
        raise ValueError("document ids mask whole rows; they do not go together with a cache")
    return causal & (document_ids_BT[:, None, :, None] == document_ids_BT[:, None, None, :])
