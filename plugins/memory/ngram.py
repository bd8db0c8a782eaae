"""N-gram memory: embeddings of the latest tokens, added to the token embedding.

    x_t = e(t_t) + concat over orders n of M_n[hash(t_(t-n+1), ..., t_t) mod R]       M_n [R, D / their number]
                 + sum over match orders m of F_m[token after the last m tokens' latest occurrence in the row]

The tables M are addressed by hashes of n-grams. They have many rows and a token reads one of each: parameters that cost
memory and no products, a kind of sparsity beside experts. What commonly follows a pair or a triple of tokens is then
nothing that attention has to learn. DeepSeek's Engram (arXiv 2601.07372) looks up hashed n-grams too, and mixes them
into inner layers through gates; here they enter once, at the bottom.

The second sum is an induction head without weights for its search: it finds where the latest tokens stood before and
says what came next there, 0 standing for nothing found (n-gram heads, arXiv 2401.12973). A small model needs far more
tokens than it is trained on before attention does this.

Gradients of the tables are sparse: a step touches as many rows as it has tokens, however many there are.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.bounds import PositiveInt
from dsv3.contracts import Cache
from dsv3.model.layers import PositionCache, hashed, next_positions

MULTIPLIER = 0x5851F42D4C957F2D
"""Of Knuth's linear congruential generator (MMIX): odd, and its bits are well mixed."""


class NGramMemory(nn.Module):
    """Tables addressed by hashes of n-grams, where different ones may meet in a row, and a table of what followed."""

    def __init__(
        self,
        *,
        dim: PositiveInt,
        vocab_size: PositiveInt,
        orders: Sequence[int],
        rows: PositiveInt,
        match_orders: Sequence[int],
    ) -> None:
        """orders: lengths n of the hashed n-grams, 2 or more. rows: R of each of their tables.
        match_orders: lengths m of what is looked for in the row, 1 or more. Either list may be empty.

        Raises ValueError where a list repeats itself or holds too small a length, `rows` is below 1, or `dim` is not a
        multiple of the number of orders; both lists empty are `memory=none`.
        """
        super().__init__()
        for name, given, least in (("orders", orders, 2), ("match_orders", match_orders, 1)):
            if len(set(given)) < len(given) or min(given, default=least) < least:
                raise ValueError(f"memory.{name}={list(given)}: must be distinct n-gram lengths of at least {least}")
        if not orders and not match_orders:
            raise ValueError("memory.orders and memory.match_orders: must not both be empty; memory=none adds nothing")
        if rows < 1:
            raise ValueError(f"memory.rows={rows}: must be at least 1")
        if orders and dim % len(orders):
            raise ValueError(
                f"memory.orders={list(orders)}: model.dim={dim} must be a multiple of their number, {len(orders)}"
            )
        self.orders, self.rows, self.match_orders = tuple(orders), rows, tuple(match_orders)
        self.tables = nn.ModuleList(nn.Embedding(rows, dim // len(orders), sparse=True) for _ in orders)
        if match_orders:
            self.followers = nn.EmbeddingBag(len(match_orders) * (vocab_size + 1), dim, mode="sum", sparse=True)
        self.vocab_size = vocab_size
        self.active_parameters = dim * (bool(orders) + len(match_orders))

    def forward(
        self, x_BTD: Tensor, tokens_BT: Tensor, document_ids_BT: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        known_BS, new_BT = tokens_BT, None
        if cache is not None:
            assert isinstance(cache, PositionCache)
            new_BT = next_positions(cache.lengths.values(), tokens_BT.shape[1], tokens_BT.device)
            cache.append(tokens_BT.unsqueeze(-1))
            known_BS = cache.read().squeeze(-1)  # what follows the shorter rows changes nothing before it

        def new(of_BS: Tensor) -> Tensor:
            return of_BS if new_BT is None else of_BS.gather(1, new_BT)

        keys = self.keys(known_BS, document_ids_BT)
        if self.orders:
            rows = [new(keys[order]) % self.rows for order in self.orders]
            looked_up = [table(ids_BT) for table, ids_BT in zip(self.tables, rows, strict=True)]
            x_BTD = x_BTD + torch.cat(looked_up, dim=-1).to(x_BTD.dtype)
        if self.match_orders:
            if document_ids_BT is not None:  # what stands in another document is not seen
                keys = {order: keys[order] + document_ids_BT for order in self.match_orders}
            found = [new(following(known_BS, keys[order])) for order in self.match_orders]
            ids_BTM = torch.stack([ids_BT + i * (self.vocab_size + 1) for i, ids_BT in enumerate(found)], dim=-1)
            x_BTD = x_BTD + self.followers(ids_BTM.flatten(0, 1)).view(x_BTD.shape).to(x_BTD.dtype)
        return x_BTD

    def keys(self, tokens_BS: Tensor, document_ids_BS: Tensor | None = None) -> dict[int, Tensor]:
        """By length, a number for the n-gram that ends at each position, int64 [B, S], equal for equal ones.

        Where there is no earlier token, or one of another document, 0 stands in its place, and tokens count from 1.
        """
        found = {1: mixed(tokens_BS + 1)}
        for back in range(1, max((*self.orders, *self.match_orders, 1))):
            earlier_BS = shifted(tokens_BS + 1, back, fill=0)
            if document_ids_BS is not None:
                same_BS = shifted(document_ids_BS, back, fill=-1) == document_ids_BS
                earlier_BS = earlier_BS * same_BS
            found[back + 1] = mixed(found[back] + earlier_BS)
        return found

    def new_cache(self, rows: Iterable[int] = ()) -> Cache:
        return PositionCache(1, dtype=torch.int64, device=next(self.parameters()).device, rows=rows)


def following(tokens_BS: Tensor, keys_BS: Tensor) -> Tensor:
    """1 + the token after the last earlier position with the same key, 0 where there is none; int64 [B, S]."""
    sorted_BS, order_BS = keys_BS.sort(dim=1, stable=True)  # positions with one key lie together, in their order
    next_BS = F.pad(tokens_BS[:, 1:] + 1, (0, 1)).gather(1, order_BS)
    again_BS = sorted_BS[:, 1:] == sorted_BS[:, :-1]
    return torch.zeros_like(tokens_BS).scatter_(1, order_BS[:, 1:], next_BS[:, :-1] * again_BS)


def shifted(x_BS: Tensor, by: int, *, fill: int) -> Tensor:
    """x_BS of `by` positions before, `fill` where there is none."""
    return F.pad(x_BS, (by, 0), value=fill)[:, : x_BS.shape[1]]


def mixed(key: Tensor) -> Tensor:
    """int64 -> int64, none below 0: the last shift copies a sign bit onto itself, which clears it."""
    return hashed(key, ((29, MULTIPLIER),), 32)
