"""FLOPs per token: matrix products only, with a multiply-add as two FLOPs.

Forward, with p a component's matrices that a token meets: 2 p, and in attention the products of queries with keys
and of weights with values besides. Causal attention is counted as half: a token of a row of T sees T/2 positions.
Norms, RoPE, softmax, SiLU, the embedding's look-up and quantisation count as nothing.

Training is three times forward (each product has two in the backward pass). What is recomputed is not part of it:
it is stated apart, so that MFU counts the model's operations and not how they are carried out.
"""

from dsv3.planning.recipe import Recomputation
from dsv3.planning.skeleton import Skeleton


def forward_flops(s: Skeleton, seen: int) -> dict[str, int]:
    """Component -> operations per token that sees `seen` positions; `total` is `model`, all but MTP, and MTP."""
    projections, scores = _attention(s, seen)
    head = 2 * s.dim * s.vocab_size
    parts = {
        "attention projections": s.layers * projections,
        "attention scores": s.layers * scores,
        "dense FFN": s.dense_layers * _ffn(s, s.inter_dim),
        "router": s.moe_layers * 2 * s.router_parameters,
        "shared experts": s.moe_layers * _ffn(s, s.shared_dim),
        "routed experts": s.moe_layers * s.top_k * _ffn(s, s.expert_dim),
        "head": head,
    }
    blocks = s.mtp.dense_blocks + s.mtp.moe_blocks
    own = 2 * sum(matrix.size for matrix in s.mtp.matrices)
    mtp = own + blocks * (projections + scores) + s.mtp.dense_blocks * _ffn(s, s.inter_dim)
    mtp += s.mtp.moe_blocks * _moe(s) + s.mtp.depth * head
    model = sum(parts.values())
    return {**parts, "model": model, "MTP": mtp, "total": model + mtp}


def training_flops(s: Skeleton, seq_len: int) -> dict[str, int]:
    """Forward and backward per token of rows of `seq_len` tokens, by component."""
    return {name: 3 * flops for name, flops in forward_flops(s, seq_len // 2).items()}


def recomputed_flops(s: Skeleton, seq_len: int, recompute: Recomputation) -> int:
    """Operations per token that the backward pass repeats: none, the up-projections, or every block's forward."""
    blocks = s.layers + s.mtp.dense_blocks + s.mtp.moe_blocks
    if recompute == "none":
        return 0
    if recompute == "selective":
        return blocks * 2 * sum(m.size for m in s.attention.matrices if m.role == "attention_up")
    forward = forward_flops(s, seq_len // 2)
    return forward["total"] - (1 + s.mtp.depth) * forward["head"]


def _attention(s: Skeleton, seen: int) -> tuple[int, int]:
    """One layer's projections, and its products over `seen` positions."""
    projections = s.attention.flops(0)
    return projections, s.attention.flops(seen) - projections


def _ffn(s: Skeleton, width: int) -> int:
    return 2 * 3 * s.dim * width


def _moe(s: Skeleton) -> int:
    return 2 * s.router_parameters + _ffn(s, s.shared_dim) + s.top_k * _ffn(s, s.expert_dim)
