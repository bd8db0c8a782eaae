"""N-gram memory: vectors looked up by the latest tokens, added to the embedding.

    x_t = e(t_t) + concat over orders n of  M_n[hash_n(t_(t-n+1), ..., t_t) mod R],     M_n [R, D / number of orders]

A table has many rows and a token reads one of each: parameters that cost memory and no products, a kind of sparsity
beside experts. What follows a pair or a triple of tokens need not be learned by attention, which is left to what is
further away. DeepSeek's Engram (arXiv 2601.07372) looks up hashed n-grams too, and mixes them into inner layers through
gates; here they enter once, at the bottom.

Gradients of the tables are sparse: a step touches as many rows as it has tokens, whatever R is.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.contracts import Cache

MULTIPLIER = 0x5851F42D4C957F2D
"""Of Knuth's linear congruential generator (MMIX): odd, and its bits are well mixed."""


class TokenCache:
    """The tokens read so far, int64 [B, capacity]."""

    def __init__(self, batch: int, capacity: int, device: torch.device) -> None:
        self.tokens = torch.zeros(batch, capacity, dtype=torch.int64, device=device)
        self.length = 0

    def append(self, tokens_BT: Tensor, before: int) -> Tensor:
        """Add T tokens and return them after up to `before` of those that were held."""
        start, end = max(self.length - before, 0), self.length + tokens_BT.shape[1]
        if end > self.tokens.shape[1]:
            raise ValueError(f"the cache holds {self.tokens.shape[1]} positions, {end} are needed")
        self.tokens[:, self.length : end] = tokens_BT
        self.length = end
        return self.tokens[:, start:end]

    def rewind(self, length: int) -> None:
        self.length = length


class NGramMemory(nn.Module):
    """A table for each order, addressed by a hash; different n-grams may meet in a row."""

    def __init__(self, *, dim: int, orders: Sequence[int], rows: int) -> None:
        """orders: lengths n of the n-grams, each 2 or more. rows: R of each table.

        Raises ValueError where `orders` is empty, repeats itself or holds less than 2, `rows` is below 1, or `dim` is
        not a multiple of the number of orders.
        """
        super().__init__()
        if not orders or min(orders) < 2 or len(set(orders)) < len(orders):
            raise ValueError(f"memory.orders={list(orders)}: different lengths of n-grams, each at least 2")
        if rows < 1:
            raise ValueError(f"memory.rows={rows} is below 1")
        if dim % len(orders):
            raise ValueError(f"memory.orders={list(orders)} share a width of {dim} equally, and {len(orders)} do not")
        self.orders, self.rows = tuple(orders), rows
        self.tables = nn.ModuleList(nn.Embedding(rows, dim // len(orders), sparse=True) for _ in orders)
        self.active_parameters = dim

    def forward(
        self, x_BTD: Tensor, tokens_BT: Tensor, document_ids_BT: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        known_BS = tokens_BT
        if cache is not None:
            assert isinstance(cache, TokenCache)
            known_BS = cache.append(tokens_BT, max(self.orders) - 1)
        looked_up = [
            table(ids_BS[:, -tokens_BT.shape[1] :])
            for table, ids_BS in zip(self.tables, self.addresses(known_BS, document_ids_BT), strict=True)
        ]
        return x_BTD + torch.cat(looked_up, dim=-1).to(x_BTD.dtype)

    def addresses(self, tokens_BS: Tensor, document_ids_BS: Tensor | None = None) -> list[Tensor]:
        """Of each order, the row of its table for the n-gram that ends at each position, int64 [B, S].

        Where there is no earlier token, or one of another document, 0 stands in its place, and tokens count from 1.
        """
        key_BS, found = tokens_BS + 1, []
        for back in range(1, max(self.orders)):
            earlier_BS = F.pad(tokens_BS + 1, (back, 0))[:, : tokens_BS.shape[1]]
            if document_ids_BS is not None:
                before_BS = F.pad(document_ids_BS, (back, 0), value=-1)[:, : tokens_BS.shape[1]]
                earlier_BS = earlier_BS.masked_fill(before_BS != document_ids_BS, 0)
            key_BS = mixed(key_BS) + earlier_BS
            if back + 1 in self.orders:
                found.append((back + 1, mixed(key_BS) % self.rows))
        ids = dict(found)
        return [ids[order] for order in self.orders]

    def new_caches(self, batch: int, capacity: int) -> list[Cache]:
        return [TokenCache(batch, capacity, next(self.parameters()).device)]


def mixed(key: Tensor) -> Tensor:
    """int64 -> int64, one to one, every bit of the result depending on many of the key's; products wrap around."""
    key = (key ^ (key >> 29)) * MULTIPLIER
    return key ^ (key >> 32)
