"""Attention over cached positions as ONNX nodes: MLA on its latents, and grouped-query attention.

Each row of a batch reads its tokens at the positions after the `length[b]` that its caches hold. Caches are written in
place: an input `cache_*` [B, S, width] becomes the output `present_*` with the new positions in it, and where both are
bound to the same memory nothing is copied.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from dsv3.checkpoint.onnx.nodes import MICROSOFT, Nodes

LOWEST = -1e30
"""Score of what is not seen; a softmax of it is 0."""


class Positions(NamedTuple):
    """What all layers of a graph share."""

    rows: str  # B, as a vector of one number
    tokens: str  # T
    ids: str  # int64 [B, T]: of each token a row of cos and sin
    cos: str  # [B*T, R / 2]
    sin: str
    length: str  # int64 [B]: positions held
    mask: str  # [B, 1, T * queries a token, S]: added to scores


def positions(g: Nodes, cache: str, frequencies_R2: Tensor, *, repeats: int) -> Positions:
    """Read the graph's inputs `tokens` and `length`. repeats: queries of a token that the mask has rows for."""
    shape = g.op("Shape", "tokens")
    rows, tokens = (g.op("Gather", shape, g.const([i])) for i in (0, 1))
    steps = g.op("Range", g.const(0), g.op("Squeeze", tokens), g.const(1))
    at_BT = g.op("Add", g.op("Unsqueeze", "length", g.const([1])), steps)
    at_N1 = g.op("Reshape", g.op("Cast", at_BT, to=1), g.const([-1, 1]))
    angles = g.op("Mul", at_N1, g.weight("frequencies", frequencies_R2))
    count = g.op("Squeeze", g.op("Mul", rows, tokens))
    ids = g.op("Reshape", g.op("Range", g.const(0), count, g.const(1)), shape)
    held = g.op("Range", g.const(0), g.op("Gather", g.op("Shape", cache), g.const(1)), g.const(1))
    seen = g.op("LessOrEqual", held, g.op("Unsqueeze", at_BT, g.const([2])))  # B, T, S
    mask = g.op("Where", seen, g.const(0, np.float32), g.const(LOWEST, np.float32))
    mask = g.op("Unsqueeze", mask, g.const([2]))
    if repeats > 1:
        mask = g.op("Expand", mask, g.const([1, 1, repeats, 1]))
    whole = g.op("Concat", rows, g.const([1]), g.op("Mul", tokens, g.const([repeats])), g.const([-1]), axis=0)
    return Positions(
        rows, tokens, ids, g.op("Cos", angles), g.op("Sin", angles), "length", g.op("Reshape", mask, whole)
    )


class LatentAttention:
    """MLA: queries are taken to the latent space, where all heads share one key and one value, k_R and c_KV.

    W_UK is multiplied into W_UQ and W_UV into W_O, the softmax scale into the queries' weights; the rotated key stands
    before the latent, so that one node turns queries and key, and zeros in W_O drop its part of the values.
    """

    def __init__(self, g: Nodes, arguments: dict[str, Any]) -> None:
        self.g, self.eps, self.q_rank = g, arguments["norm_eps"], arguments["q_lora_rank"]
        self.heads, self.rank, self.rope = (arguments[key] for key in ("n_heads", "kv_lora_rank", "qk_rope_head_dim"))
        self.nope, self.v = arguments["qk_nope_head_dim"], arguments["v_head_dim"]
        self.width = self.rope + self.rank
        self.mask_repeats = self.heads

    def caches(self, layer: int) -> dict[str, int]:
        """Names and widths of what a layer keeps."""
        return {f"{layer}": self.width}

    def __call__(self, x: str, layer: int, name: str, w: dict[str, Tensor], scale: float, at: Positions) -> str:
        """x [N, D] -> [N, D]. w: the attention's weights by their names."""
        g, heads, width = self.g, self.heads, self.width
        w_q, down = self._queries(w, scale), w["kv_a_proj_with_mqa.weight"]
        key_latent = torch.cat((down[self.rank :], down[: self.rank]))
        first = w["q_a_proj.weight"] if self.q_rank else w_q
        cut = g.const([len(first), self.rope, self.rank])
        q, k_rope, latent = g.ops(
            "Split", g.linear(x, f"{name}.in", torch.cat((first, key_latent))), cut, outs=3, axis=-1
        )
        if self.q_rank:
            normed = g.norm(q, f"{name}.q_norm", w["q_a_layernorm.weight"], self.eps)
            q = g.linear(normed, f"{name}.q", w_q)
        latent = g.norm(latent, f"{name}.kv_norm", w["kv_a_layernorm.weight"], self.eps)
        batched = g.op("Concat", at.rows, at.tokens, g.const([-1]), axis=0)
        qk = g.op("Reshape", g.op("Concat", q, k_rope, latent, axis=-1), batched)
        turned = {"interleaved": 1, "num_heads": heads + 1, "rotary_embedding_dim": self.rope}
        qk = g.op("RotaryEmbedding", qk, at.ids, at.cos, at.sin, domain=MICROSOFT, **turned)
        q, k = g.ops("Split", qk, g.const([heads * width, width]), outs=2, axis=-1)
        present = g.op("TensorScatter", f"cache_{layer}", k, at.length, axis=1, out=f"present_{layer}")
        # Tokens and heads are queries of one head: the keys are read once for all of them.
        one_head = g.op("Concat", at.rows, g.op("Mul", at.tokens, g.const([heads])), g.const([width]), axis=0)
        q = g.op("Reshape", q, one_head)
        o = g.op("Attention", q, present, present, at.mask, q_num_heads=1, kv_num_heads=1, scale=1.0)
        return g.linear(g.op("Reshape", o, g.const([-1, heads * width])), f"{name}.out", self._out(w))

    def _queries(self, w: dict[str, Tensor], scale: float) -> Tensor:
        """[H * (R + C), q_rank or D]: each head's rotated rows, then its others in the latent space."""
        w_uk_HNC = w["kv_b_proj.weight"].unflatten(0, (self.heads, -1))[:, : self.nope]
        projection = w["q_b_proj.weight" if self.q_rank else "q_proj.weight"]
        nope, rope = projection.unflatten(0, (self.heads, -1)).split([self.nope, self.rope], 1)
        return (torch.cat((rope, w_uk_HNC.mT @ nope), 1) * scale).flatten(0, 1)

    def _out(self, w: dict[str, Tensor]) -> Tensor:
        """[D, H * (R + C)]."""
        w_uv_HVC = w["kv_b_proj.weight"].unflatten(0, (self.heads, -1))[:, self.nope :]
        out_HDC = w["o_proj.weight"].unflatten(1, (self.heads, self.v)).permute(1, 0, 2) @ w_uv_HVC
        nothing = out_HDC.new_zeros(*out_HDC.shape[:2], self.rope)
        return torch.cat((nothing, out_HDC), 2).permute(1, 0, 2).flatten(1)


class GroupedAttention:
    """GQA and MHA: keys, after RoPE, and values of `n_kv_heads` heads."""

    mask_repeats = 1

    def __init__(self, g: Nodes, arguments: dict[str, Any]) -> None:
        self.g = g
        self.heads, self.kv_heads, self.head = (arguments[key] for key in ("n_heads", "n_kv_heads", "head_dim"))

    def caches(self, layer: int) -> dict[str, int]:
        """Names and widths of what a layer keeps."""
        return {f"{layer}_{part}": self.kv_heads * self.head for part in ("key", "value")}

    def __call__(self, x: str, layer: int, name: str, w: dict[str, Tensor], scale: float, at: Positions) -> str:
        """x [N, D] -> [N, D]. w: the attention's weights by their names."""
        g, q_width, kv_width = self.g, self.heads * self.head, self.kv_heads * self.head
        weights = (w["q_proj.weight"] * scale, w["k_proj.weight"], w["v_proj.weight"])
        batched = g.op("Concat", at.rows, at.tokens, g.const([-1]), axis=0)
        qkv = g.op("Reshape", g.linear(x, f"{name}.in", torch.cat(weights)), batched)
        qk, v = g.ops("Split", qkv, g.const([q_width + kv_width, kv_width]), outs=2, axis=-1)
        turned = {"interleaved": 0, "num_heads": self.heads + self.kv_heads, "rotary_embedding_dim": self.head}
        qk = g.op("RotaryEmbedding", qk, at.ids, at.cos, at.sin, domain=MICROSOFT, **turned)
        q, k = g.ops("Split", qk, g.const([q_width, kv_width]), outs=2, axis=-1)
        keys, values = (
            g.op("TensorScatter", f"cache_{layer}_{part}", new, at.length, axis=1, out=f"present_{layer}_{part}")
            for part, new in (("key", k), ("value", v))
        )
        counts = {"q_num_heads": self.heads, "kv_num_heads": self.kv_heads}
        o = g.op("Attention", q, keys, values, at.mask, scale=1.0, **counts)
        return g.linear(g.op("Reshape", o, g.const([-1, q_width])), f"{name}.out", w["o_proj.weight"])
