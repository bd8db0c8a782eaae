"""Multi-head Latent Attention (report eq. 1-11).

    c_Q = norm(W_DQ h)          q = [W_UQ c_Q ; RoPE(W_QR c_Q)]                    per head
    c_KV = norm(W_DKV h)        k = [W_UK c_KV ; RoPE(W_KR h)]   v = W_UV c_KV     k_R is shared by all heads
    o = softmax(q k^T * scale) v,   output W_O o,   scale = (d_h + d_R)^-1/2

Decoding keeps c_KV and k_R only. `absorb` decoding never expands them: q_C^T (W_UK c) = (W_UK^T q_C)^T c, so the
query is taken to the latent space, attends to the latents as one shared head, and W_UV is applied to the result.

Weights carry transformers' names and layout: `kv_a_proj_with_mqa` is [W_DKV ; W_KR], and each head's rows in
`q_b_proj` are [q_C ; q_R], in `kv_b_proj` [k_C ; v]. `joined` declares them, so that an optimiser steps the matrices
of the equations: W_UQ, W_QR, W_UK and W_UV of all heads, W_DKV and W_KR.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dsv3.bounds import PositiveFloat, PositiveInt
from dsv3.contracts import Precision
from dsv3.model.layers import CACHE_BLOCK, PositionCache, RMSNorm, StaticCache
from dsv3.model.recompute import recomputed
from plugins.attention import rope
from plugins.attention.causal import causal_attention
from plugins.attention.masks import hide_later


class AbsorbedWeights(NamedTuple):
    """W_UKV cut into what takes queries to the latent space and what brings its results back."""

    w_uk_HNC: Tensor
    w_uv_HCV: Tensor


class LatentCache(PositionCache):
    """c_KV (after its norm) and k_R (after RoPE), [S, d_c + d_R] of each row."""

    def blocks(self) -> list[Tensor]:
        """Of each row all positions held, and what fills their last block up: numbers to be masked.

        Absorbed decoding reads latents in whole blocks: on a CPU, oneDNN compiles the BF16 products of every new size,
        which takes longer than the rest of a small model's token.
        """
        return [row.first(-(-row.length // CACHE_BLOCK) * CACHE_BLOCK) for row in self.rows.values()]


class MultiHeadLatentAttention(nn.Module):
    """MLA; `q_lora_rank` None means a plain query projection (DeepSeek-V2-Lite)."""

    def __init__(
        self,
        *,
        dim: PositiveInt,
        n_heads: PositiveInt,
        q_lora_rank: PositiveInt | None,
        kv_lora_rank: PositiveInt,
        qk_nope_head_dim: PositiveInt,
        qk_rope_head_dim: PositiveInt,
        v_head_dim: PositiveInt,
        rope_theta: PositiveFloat,
        yarn: Mapping[str, Any] | None,
        norm_eps: PositiveFloat,
        decode: Literal["absorb", "naive"],
        precision: Precision,
    ) -> None:
        super().__init__()
        if qk_rope_head_dim % 2:
            raise ValueError(f"model.qk_rope_head_dim={qk_rope_head_dim}: must be even: RoPE rotates pairs")
        if decode not in ("absorb", "naive"):
            raise ValueError(f"attention.decode={decode}: must be absorb or naive")
        self.n_heads, self.decode = n_heads, decode
        self.nope, self.rope, self.v, self.rank = qk_nope_head_dim, qk_rope_head_dim, v_head_dim, kv_lora_rank
        self.rope_theta, self.yarn = rope_theta, yarn
        self.frequencies = rope.Frequencies(qk_rope_head_dim, rope_theta, yarn)
        qk_width = qk_nope_head_dim + qk_rope_head_dim
        self.scale = qk_width**-0.5 * rope.softmax_factor(yarn)
        self.cache_dtype = precision.activation_dtype
        if q_lora_rank:
            self.q_a_proj = precision.linear(dim, q_lora_rank, role="attention_down")
            self.q_a_layernorm = RMSNorm(q_lora_rank, eps=norm_eps)
            self.q_b_proj = precision.linear(q_lora_rank, n_heads * qk_width, role="attention_up")
        else:
            self.q_proj = precision.linear(dim, n_heads * qk_width, role="attention_up")
        self.q_lora_rank = q_lora_rank
        self.holds_weights = False
        self.absorbed: AbsorbedWeights | None = None  # once they are needed, while W_UKV stays
        self.kv_a_proj_with_mqa = precision.linear(dim, kv_lora_rank + qk_rope_head_dim, role="attention_down")
        self.kv_a_layernorm = RMSNorm(kv_lora_rank, eps=norm_eps)
        self.kv_b_proj = precision.linear(kv_lora_rank, n_heads * (self.nope + self.v), role="attention_up")
        self.o_proj = precision.linear(n_heads * v_head_dim, dim, role="attention_out")
        self.joined = {
            "q_b_proj.weight" if q_lora_rank else "q_proj.weight": (qk_nope_head_dim, qk_rope_head_dim),
            "kv_a_proj_with_mqa.weight": (kv_lora_rank, qk_rope_head_dim),
            "kv_b_proj.weight": (qk_nope_head_dim, v_head_dim),
        }

    def forward(
        self,
        x_BTD: Tensor,
        positions_BT: Tensor,
        document_ids_BT: Tensor | None = None,
        cache: LatentCache | StaticCache | None = None,
    ) -> Tensor:
        cos, sin = rope.cos_sin(positions_BT, self.frequencies.on(x_BTD.device))
        c_Q_BTC = self.q_a_layernorm(self.q_a_proj(x_BTD)) if self.q_lora_rank else x_BTD
        c_BTC, k_rope = self.kv_a_proj_with_mqa(x_BTD).split([self.rank, self.rope], dim=-1)
        c_BTC, k_rope = self.kv_a_layernorm(c_BTC), rope.rotate(k_rope.unsqueeze(2), cos, sin).squeeze(2)
        lengths = None
        if isinstance(cache, StaticCache):
            cache.append(torch.cat((c_BTC, k_rope), -1))
            return self.o_proj(self._absorbed_static(*self._query(c_Q_BTC, cos, sin), cache))
        if cache is not None:
            began_empty = not any(cache.lengths.values())
            cache.append(torch.cat((c_BTC, k_rope), -1))
            lengths = list(cache.lengths.values())
            if self.decode == "absorb" and not began_empty:
                q_nope, q_rope = self._query(c_Q_BTC, cos, sin)
                return self.o_proj(self._absorbed(q_nope, q_rope, cache.blocks(), lengths))
            c_BTC, k_rope = cache.read().split([self.rank, self.rope], dim=-1)
        q, k, v = recomputed("attention_up", self._expanded, c_Q_BTC, c_BTC, k_rope, cos, sin)
        out = causal_attention(q, k, v, document_ids_BT=document_ids_BT, lengths=lengths)
        return self.o_proj(out.transpose(1, 2).flatten(-2))

    def _query(self, c_Q_BTC: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """[B, T, H, d_h] and, turned, [B, T, H, d_R], from c_Q (or from the model's states)."""
        q = self.q_b_proj(c_Q_BTC) if self.q_lora_rank else self.q_proj(c_Q_BTC)
        q_nope, q_rope = q.unflatten(-1, (self.n_heads, -1)).split([self.nope, self.rope], dim=-1)
        return q_nope, rope.rotate(q_rope, cos, sin)

    def _expanded(
        self, c_Q_BTC: Tensor, c_BSC: Tensor, k_rope: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scaled queries [B, H, T, d_h + d_R], keys [B, H, S, d_h + d_R] and values [B, H, S, d_v] of every head.

        S >= T positions are held; the queries are the last T of each row.
        """
        q_BTHQ = torch.cat(self._query(c_Q_BTC, cos, sin), -1) * self.scale
        kv = self.kv_b_proj(c_BSC).unflatten(-1, (self.n_heads, self.nope + self.v))
        k_nope, v_BSHV = kv.split([self.nope, self.v], dim=-1)
        k_BSHQ = torch.cat((k_nope, k_rope.unsqueeze(2).expand(-1, -1, self.n_heads, -1)), -1)
        q, k, v = (t.transpose(1, 2).contiguous() for t in (q_BTHQ, k_BSHQ, v_BSHV))
        return q, k, v

    def _absorbed(self, q_nope: Tensor, q_rope: Tensor, latents: list[Tensor], lengths: list[int]) -> Tensor:
        """Attention in the latent space: per head a query of width d_c + d_R, one key and value for all heads.

        `latents`: of row b, [S_b, d_c + d_R], of which the first lengths[b] positions are held. Heads and positions are
        rows of one product, so that the keys are read where they lie; a row's result does not depend on how many there
        are, in BF16 not by a bit.
        """
        rows, queries = q_nope.shape[:2]
        w_uk_HNC, w_uv_HCV = self._absorbed_weights()
        q_HXN = q_nope.flatten(0, 1).transpose(0, 1)  # X = B*T, as in o below
        q_BTHC = torch.bmm(q_HXN, w_uk_HNC).transpose(0, 1).unflatten(0, (rows, queries))
        q_BXC = torch.cat((q_BTHC, q_rope), dim=-1).flatten(1, 2)  # X = T*H
        # A product a row of the batch: a batched one would copy the latents to turn them.
        widths = [c_SC.shape[0] for c_SC in latents]
        longest, alike = max(widths), len(set(widths)) == 1
        scores = [q_XC @ c_SC.T for q_XC, c_SC in zip(q_BXC, latents, strict=True)]
        if not alike:
            scores = [F.pad(score_XS, (0, longest - width)) for score_XS, width in zip(scores, widths, strict=True)]
        scores_BXS = torch.stack(scores)
        dtype = torch.promote_types(self.cache_dtype, torch.float32)
        scores_BTHS = scores_BXS.to(dtype).mul_(self.scale).unflatten(1, (queries, self.n_heads))
        hide_later(scores_BTHS, lengths)
        weights_BXS = scores_BTHS.softmax(-1).to(self.cache_dtype).flatten(1, 2)
        weights = weights_BXS if alike else [w_XS[:, :n] for w_XS, n in zip(weights_BXS, widths, strict=True)]
        o_BXC = torch.stack([w_XS @ c_SC[:, : self.rank] for w_XS, c_SC in zip(weights, latents)])
        o_HXC = o_BXC.unflatten(1, (queries, self.n_heads)).flatten(0, 1).transpose(0, 1)
        o_HXV = torch.bmm(o_HXC, w_uv_HCV)
        return o_HXV.transpose(0, 1).unflatten(0, (rows, queries)).flatten(-2)

    def _absorbed_static(self, q_nope: Tensor, q_rope: Tensor, cache: StaticCache) -> Tensor:
        """The same of one token of each row, over all places of the cache: products whose shapes never change."""
        w_uk_HNC, w_uv_HCV = self._absorbed_weights()
        q_BHC = torch.bmm(q_nope.squeeze(1).transpose(0, 1), w_uk_HNC).transpose(0, 1)
        q_BHL = torch.cat((q_BHC, q_rope.squeeze(1)), -1)  # L = d_c + d_R
        dtype = torch.promote_types(self.cache_dtype, torch.float32)
        scores_BHS = (q_BHL @ cache.held.mT).to(dtype).mul_(self.scale)
        scores_BHS.masked_fill_(cache.later_BS().unsqueeze(1), float("-inf"))
        o_BHC = scores_BHS.softmax(-1).to(self.cache_dtype) @ cache.held[..., : self.rank]
        return torch.bmm(o_BHC.transpose(0, 1), w_uv_HCV).transpose(0, 1).flatten(1).unsqueeze(1)

    def hold_weights(self, hold: bool) -> bool:
        """Whether that changed anything: between True and False W_UKV stays, and so does what is made from it."""
        changed = hold != self.holds_weights
        self.holds_weights, self.absorbed = hold, self.absorbed if hold else None
        return changed

    def _absorbed_weights(self) -> AbsorbedWeights:
        if self.absorbed is not None:
            return self.absorbed
        weight = self.kv_b_proj.get_parameter("weight").detach().to(self.cache_dtype)
        w_HOC = weight.unflatten(0, (self.n_heads, self.nope + self.v))
        w_uk_HNC, w_uv_HVC = w_HOC.split([self.nope, self.v], dim=1)
        made = AbsorbedWeights(w_uk_HNC.contiguous(), w_uv_HVC.mT.contiguous())
        self.absorbed = made if self.holds_weights else None
        return made

    def new_cache(self, rows: Iterable[int] = ()) -> LatentCache:
        width = self.kv_cache_elements_per_token()
        return LatentCache(width, dtype=self.cache_dtype, device=next(self.parameters()).device, rows=rows)

    def new_static_cache(self, lengths_B: Tensor, positions: int) -> StaticCache | None:
        return StaticCache.like(self.new_cache(), lengths_B, positions) if self.decode == "absorb" else None

    def kv_cache_elements_per_token(self) -> int:
        """d_c + d_R: 576 at 671B."""
        return self.rank + self.rope

    def flops_per_token(self, context: int) -> int:
        products = sum(p.numel() for p in self.parameters() if p.ndim == 2)
        return 2 * products + 2 * self.n_heads * context * (self.nope + self.rope + self.v)
