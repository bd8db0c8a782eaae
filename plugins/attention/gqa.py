"""Grouped-query attention (arXiv 2305.13245), as in LLaMA and DeepSeek LLM (arXiv 2401.02954).

    q = RoPE(W_Q h)   k = RoPE(W_K h)   v = W_V h           per head of width d_h
    o = softmax(q k^T * d_h^-1/2) v,    output W_O o

The query heads stand in `n_kv_heads` groups of neighbours, and a group shares one key and one value head:
`n_kv_heads = n_heads` is multi-head attention, 1 is multi-query attention. Decoding keeps k (after RoPE) and v.

Weights carry transformers' names and its LLaMA layout, in which RoPE turns halves of a head (see `rope`).
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dsv3.bounds import PositiveFloat, PositiveInt
from dsv3.contracts import Precision
from dsv3.model.layers import PositionCache, StaticCache
from dsv3.model.recompute import recomputed
from plugins.attention import rope
from plugins.attention.causal import causal_attention


class GroupedQueryAttention(nn.Module):
    """GQA over packed rows; the position of a token turns its queries and keys, nothing else.

    dim: model width. n_heads, n_kv_heads: query heads, and key and value heads, which must divide them.
    head_dim: d_h, even; n_heads * head_dim need not be dim.
    rope_theta, yarn: see `rope`.
    """

    def __init__(
        self,
        *,
        dim: PositiveInt,
        n_heads: PositiveInt,
        n_kv_heads: PositiveInt,
        head_dim: PositiveInt,
        rope_theta: PositiveFloat,
        yarn: Mapping[str, Any] | None,
        precision: Precision,
    ) -> None:
        super().__init__()
        if n_heads % n_kv_heads:
            raise ValueError(f"model.n_kv_heads={n_kv_heads}: must divide model.n_heads={n_heads}")
        if head_dim % 2:
            raise ValueError(f"model.head_dim={head_dim}: must be even: RoPE rotates pairs")
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim
        self.rope_theta, self.yarn = rope_theta, yarn
        self.frequencies = rope.Frequencies(head_dim, rope_theta, yarn)
        self.scale = head_dim**-0.5 * rope.softmax_factor(yarn)
        self.cache_dtype = precision.activation_dtype
        self.q_proj = precision.linear(dim, n_heads * head_dim, role="attention_up")
        self.k_proj = precision.linear(dim, n_kv_heads * head_dim, role="attention_up")
        self.v_proj = precision.linear(dim, n_kv_heads * head_dim, role="attention_up")
        self.o_proj = precision.linear(n_heads * head_dim, dim, role="attention_out")

    def forward(
        self,
        x_BTD: Tensor,
        positions_BT: Tensor,
        document_ids_BT: Tensor | None = None,
        cache: PositionCache | StaticCache | None = None,
    ) -> Tensor:
        cos, sin = rope.cos_sin(positions_BT, self.frequencies.on(x_BTD.device))
        q, k, v = recomputed("attention_up", self._projected, x_BTD, cos, sin)
        lengths = None
        if cache is not None:
            cache.append(torch.stack((k, v), dim=1))
        if isinstance(cache, StaticCache):
            return self.o_proj(self._over_all(q, cache))
        if cache is not None:
            k, v = cache.read().unbind(1)
            lengths = list(cache.lengths.values())
        if self.n_heads != self.n_kv_heads:
            k, v = (t.repeat_interleave(self.n_heads // self.n_kv_heads, dim=1) for t in (k, v))
        out = causal_attention(q, k, v, document_ids_BT=document_ids_BT, lengths=lengths)
        return self.o_proj(out.transpose(1, 2).flatten(-2))

    def _over_all(self, q_BH1R: Tensor, cache: StaticCache) -> Tensor:
        """Attention of one token of each row, over all places of the cache: products whose shapes never change."""
        k_BKSR, v_BKSR = cache.held.unbind(1)
        dtype = torch.promote_types(self.cache_dtype, torch.float32)
        scores_BKGS = (q_BH1R.squeeze(2).unflatten(1, (self.n_kv_heads, -1)) @ k_BKSR.mT).to(dtype)
        scores_BKGS.masked_fill_(cache.later_BS()[:, None, None], float("-inf"))
        return (scores_BKGS.softmax(-1).to(self.cache_dtype) @ v_BKSR).flatten(1).unsqueeze(1)

    def _projected(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled queries, keys and values, [B, heads, T, d_h] each."""
        q_BTHR, k_BTHR, v_BTHR = (
            project(x_BTD).unflatten(-1, (-1, self.head_dim)) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BTHR, k_BTHR = rope.rotate_halves(q_BTHR, cos, sin) * self.scale, rope.rotate_halves(k_BTHR, cos, sin)
        q, k, v = (t.transpose(1, 2).contiguous() for t in (q_BTHR, k_BTHR, v_BTHR))
        return q, k, v

    def new_cache(self, rows: Iterable[int] = ()) -> PositionCache:
        shape = (2, self.n_kv_heads, self.head_dim)  # k (after RoPE) and v
        return PositionCache(*shape, dtype=self.cache_dtype, device=next(self.parameters()).device, rows=rows)

    def new_static_cache(self, lengths_B: Tensor, positions: int) -> StaticCache:
        return StaticCache.like(self.new_cache(), lengths_B, positions)

    def kv_cache_elements_per_token(self) -> int:
        """A key and a value of every KV head."""
        return 2 * self.n_kv_heads * self.head_dim

    def flops_per_token(self, context: int) -> int:
        products = sum(p.numel() for p in self.parameters() if p.ndim == 2)
        return 2 * products + 2 * self.n_heads * context * 2 * self.head_dim
